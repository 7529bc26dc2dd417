"""The reference backend: plain torch on any device, and the oracle of every other backend."""

from __future__ import annotations

import torch

from .packed import PackedWeight, compute_dtype


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + bias`: unpacks, dequantizes and multiplies in float32 (float64 for float64 x), then casts to x's dtype.

    Args:
        x: `[..., K]`, floating.
        packed: the weight.
        bias: `[N]`, or None.

    Returns:
        `[..., N]`, of x's dtype.
    """
    compute = compute_dtype(x.dtype)
    out = x.to(compute) @ packed.unpack().dequantize(compute).T
    if bias is not None:
        out += bias.to(compute)
    return out.to(x.dtype)


def input_grad(grad: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """`grad W`, the gradient of the input, `[..., K]` from `[..., N]`, computed as in `linear`."""
    compute = compute_dtype(grad.dtype)
    return (grad.to(compute) @ packed.unpack().dequantize(compute)).to(grad.dtype)
