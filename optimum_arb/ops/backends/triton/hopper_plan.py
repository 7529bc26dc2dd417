"""All launches of a product by `hopper.py`, in order: the input's columns, the product, the sum of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..packed import PackedWeight
from .hopper_product import HopperProduct, converted_scales, gather
from .launch import Ready
from .native_launch import EXTRA, OUT, SCRATCH, Slot, X
from .outputs import Outputs, aligned
from .ready_launches import ReadyProduct

if TYPE_CHECKING:
    from .gemm_config import GemmConfig


class HopperPlan(ReadyProduct):
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
        super().__init__(device, kind[0], Outputs(packed.out_features, out_dtype))
        self.out_dtype, self.with_bias = out_dtype, bias is not None
        self.gather = gather(packed, config, tokens, stride, kind, device)
        self.parts_at = 0
        if self.gather is not None:
            stride = self.gather.shape[1]
            self.parts_at = aligned(tokens * stride * kind[0].itemsize)
        self.product = HopperProduct(packed, tokens, stride, kind[0], out_dtype, bias, device, split_k, config)
        self.scratch = self.parts_at + self.product.scratch

    def copied(self) -> list[torch.Tensor]:
        return converted_scales([self.product])

    def _run_by_triton(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty((*x.shape[:-1], self.product.rows), dtype=self.out_dtype, device=x.device)
        if self.gather is not None:
            x = self.gather(x)
        self.product.run(x, bias, out)
        self._ran = True
        return out

    def ready(self) -> list[Ready | None]:
        bias = Slot(EXTRA) if self.with_bias else None
        parts = Slot(SCRATCH, self.parts_at)
        if self.gather is None:
            return self.product.ready(Slot(X), bias, Slot(OUT), parts)
        gathered = self.gather.launch.ready(self.gather.arguments(Slot(X), Slot(SCRATCH)))
        return [gathered, *self.product.ready(Slot(SCRATCH), bias, Slot(OUT), parts)]
