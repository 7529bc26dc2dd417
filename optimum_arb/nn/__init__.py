"""Layers that hold packed weights."""

from .linear import ARBLinear
from .shared_input import share_inputs

__all__ = ["ARBLinear", "share_inputs"]
