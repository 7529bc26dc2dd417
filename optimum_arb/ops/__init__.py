"""The operators that run packed layers, and their backends."""

from . import shared_input
from .experts import grouped_linear
from .linear import linear

__all__ = ["grouped_linear", "linear", "shared_input"]
