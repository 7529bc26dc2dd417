"""Packed layers of which each process holds a part, in transformers' tensor and expert parallelism."""
