"""Scales in 8 bits: codes on a logarithmic grid.

    value = exp2(low + code * step)   for code 1 to 255,   0 for code 0

A plane's row scales share one `low` and one `step`, its column scales another. Neighbouring values differ by the same
ratio everywhere: by 3 % where the scales of a plane span a factor of 2^12, which is the most; what is smaller still
takes the smallest value or 0, whichever is nearer.
"""

from __future__ import annotations

import torch

CODES = 255  # of values that are not 0
WIDEST = 12.0  # log2 of the largest value over the smallest
NARROWEST = 2.0**-10  # of a step, for scales that are all equal


def scale_grid(scale: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid that holds some scales.

    Args:
        scale: float, not negative, of any shape.
        dim: the dimensions that share a grid.

    Returns:
        `low` and `step`, float32, of the shape of `scale` with 1 in the dimensions `dim`.

    Raises:
        ValueError: a scale is negative, NaN or Inf.
    """
    size = scale.to(torch.float32)
    if not bool(((size >= 0) & torch.isfinite(size)).all()):
        raise ValueError("8-bit scales must be finite and not negative: a sign belongs into the sign plane.")
    high = size.amax(dim, keepdim=True)
    least = torch.where(size > 0, size, torch.inf).amin(dim, keepdim=True)
    high = torch.where(high > 0, high, 1.0).log2()
    low = torch.maximum(torch.where(torch.isfinite(least), least, 1.0).log2(), high - WIDEST)
    step = ((high - low) / (CODES - 1)).clamp_min(NARROWEST)
    return low - step, step


def encode_scales(scale: torch.Tensor, low: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The nearest codes, uint8 of the shape of `scale`. `decode_scales` and this give the same codes again.

    Args:
        scale: float, not negative.
        low, step: as `scale_grid` returns them, of shapes that broadcast with `scale`.
    """
    size = scale.to(torch.float32)
    code = ((size.clamp_min(torch.finfo(torch.float32).tiny).log2() - low) / step).round().clamp(1, CODES)
    return torch.where(size < (low + step).exp2() / 2, 0.0, code).to(torch.uint8)


def decode_scales(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The values of codes, float32: `exp2(low + code * step)`, and 0 for code 0."""
    return torch.where(codes == 0, 0.0, torch.exp2(low + codes.to(torch.float32) * step))
