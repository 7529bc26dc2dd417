"""The operator that runs packed layers, and its backends."""

from . import shared_input
from .linear import linear

__all__ = ["linear", "shared_input"]
