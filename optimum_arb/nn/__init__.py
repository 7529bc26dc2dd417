"""Layers that hold packed weights."""

from .experts import ARBExperts
from .factorized import ARBFactorizedLinear, packed_linear
from .linear import ARBLinear
from .shared_input import share_inputs

__all__ = ["ARBExperts", "ARBFactorizedLinear", "ARBLinear", "packed_linear", "share_inputs"]
