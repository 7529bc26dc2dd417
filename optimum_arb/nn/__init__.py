"""Layers that hold packed weights."""

from .experts import ARBExperts
from .factorized import ARBFactorizedLinear, packed_linear
from .linear import ARBLinear
from .share_inputs import share_inputs

__all__ = ["ARBExperts", "ARBFactorizedLinear", "ARBLinear", "packed_linear", "share_inputs"]
