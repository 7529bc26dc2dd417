"""Backends of the operator: each has `linear` and `input_grad` on a `PackedWeight`."""
