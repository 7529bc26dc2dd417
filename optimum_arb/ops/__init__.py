"""The operator that runs packed layers, and its backends."""

from .linear import linear

__all__ = ["linear"]
