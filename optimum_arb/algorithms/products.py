"""Products of matrices in 16 bits with sums, and results, in float32: what a GPU's tensor cores do."""

from __future__ import annotations

import torch

# torch has them from 2.8 on, on a GPU.
MIXED = hasattr(torch.ops.aten.mm, "dtype")


def product_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left right`, float32 `[M, N]`, of `[M, K]` and `[K, N]` in one 16-bit dtype, on a GPU where `MIXED` holds."""
    return torch.mm(left, right, out_dtype=torch.float32)
