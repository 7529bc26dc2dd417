"""Layers that run packed weights."""

from .linear import ARBLinear

__all__ = ["ARBLinear"]
