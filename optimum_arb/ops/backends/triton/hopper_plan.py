"""The launches of one product by `hopper.py`, in order: the input's columns, the product, the sum of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..packed import PackedWeight
from . import hopper
from .columns import Gather
from .launch import tensor_class
from .sums import Sum

if TYPE_CHECKING:
    from .gemm import GemmConfig


class HopperPlan:
    """What a product of some weight and number of tokens takes, with all but x and bias known.

    Args:
        packed: the weight.
        tokens: M.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        out_dtype: of the result.
        bias: one like those that are to be added, or None.
        device: of all tensors.
        split_k: programs that share the columns of an output tile.
        config: how else.
    """

    def __init__(
        self,
        packed: PackedWeight,
        tokens: int,
        stride: int,
        kind: tuple[torch.dtype, bool],
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
        device: torch.device,
        split_k: int,
        config: GemmConfig,
    ):
        rows = packed.out_features
        self.rows, self.out_dtype = rows, out_dtype
        self.gather = self.sum = None
        scaled = False
        if packed.permutation is not None:
            scaled = packed.layout.planes == 1 and packed.layout.col_scales == 1
            self.gather = Gather(packed, tokens, stride, kind, device, scaled=scaled)
            stride = packed.in_features
        if split_k > 1:
            self.parts = (split_k, tokens, rows)
            self.sum = Sum(split_k, tokens, rows, out_dtype, bias, device)
        self.multiply = hopper.Multiply(
            packed,
            tokens,
            stride,
            kind[0],
            out_dtype if self.sum is None else torch.float32,
            None if bias is None or self.sum is not None else tensor_class(bias),
            device,
            block_m=config.block_m,
            block_n=config.block_n,
            warps=config.warps,
            stages=config.stages,
            tiles=config.tiles,
            split_k=split_k,
            scaled=scaled,
            overlapped=True,
        )

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, on the current device."""
        out = torch.empty((*x.shape[:-1], self.rows), dtype=self.out_dtype, device=x.device)
        if self.gather is not None:
            x = self.gather(x)
        if self.sum is None:
            self.multiply(x, bias, out)
        else:
            parts = torch.empty(self.parts, dtype=torch.float32, device=x.device)
            self.multiply(x, None, parts)
            self.sum(parts, bias, out)
        return out
