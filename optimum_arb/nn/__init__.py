"""Layers that hold packed weights."""

from .experts import ARBExperts
from .linear import ARBLinear
from .shared_input import share_inputs

__all__ = ["ARBExperts", "ARBLinear", "share_inputs"]
