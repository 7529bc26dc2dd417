"""The operators that run packed layers, and their backends."""

from . import shared_input
from .experts import grouped_linear
from .hadamard import hadamard
from .linear import linear

__all__ = ["grouped_linear", "hadamard", "linear", "shared_input"]
