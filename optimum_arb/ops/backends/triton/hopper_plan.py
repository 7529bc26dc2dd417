"""All launches of a product by `hopper.py`, in order: the input's columns, the product, the sum of its parts."""

from __future__ import annotations

from typing import Any

import torch

from ..packed import PackedWeight
from .columns import Gather
from .gemm_config import GemmConfig, reads_input, scales_input
from .hopper_product import HopperProduct, converted_scales
from .launch import Ready
from .native_launch import EXTRA, OUT, Slot, X
from .outputs import Outputs, aligned
from .ready_launches import Memory, ReadyProduct, Step, memory_of, slots
from .sums import Sum


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
        self.gather: Gather | None = None
        self.parts_at = 0
        if not reads_input(packed, config):
            self.gather = Gather([packed], [scales_input(packed, config)], tokens, stride, kind, device)
            stride = self.gather.shapes[0][1]
            self.parts_at = aligned(tokens * stride * kind[0].itemsize)
        self.product = HopperProduct(packed, tokens, stride, kind[0], out_dtype, bias, device, split_k, config)
        parts = self.product.parts
        self.sum = None if parts is None else Sum([parts], tokens, out_dtype, device)
        self.scratch = self.parts_at + self.product.scratch

    def copied(self) -> list[torch.Tensor]:
        return converted_scales([self.product])

    def _run_by_triton(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty((*x.shape[:-1], self.product.rows), dtype=self.out_dtype, device=x.device)
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=x.device)
        for launch, args in self.launches(x, bias, out, memory_of(scratch)):
            launch(args)
        self._ran = True
        return out

    def ready(self) -> list[Ready | None]:
        bias = Slot(EXTRA) if self.with_bias else None
        return [launch.ready(args) for launch, args in self.launches(Slot(X), bias, Slot(OUT), slots)]

    def launches(self, x: Any, bias: Any, out: Any, memory: Memory) -> list[Step]:
        """All of them, of tensors or of what stands for them."""
        found: list[Step] = []
        if self.gather is not None:
            gathered = memory(0, self.dtype)
            found.append((self.gather.launch, self.gather.arguments(x, [gathered])))
            x = gathered
        parts = None if self.sum is None else memory(self.parts_at, torch.float32)
        found += self.product.launches(x, bias, out, parts)
        if self.sum is not None:
            found.append((self.sum.launch, self.sum.arguments(self.product.added(parts, bias, out))))
        return found
