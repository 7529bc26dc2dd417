"""Mixture-of-experts modules: their float matrices, how these are binarized, packed and named in checkpoints."""
