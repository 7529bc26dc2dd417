"""One product by `hopper.py` of an input whose columns are ready: the product, and the sum of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..packed import PackedWeight
from . import hopper
from .columns import Gather, column_scales
from .gemm_config import GemmConfig, scales_input
from .launch import Ready, tensor_class
from .native_launch import Slot
from .sums import Sum


def gather(
    packed: PackedWeight,
    config: GemmConfig,
    tokens: int,
    stride: int,
    kind: tuple[torch.dtype, bool],
    device: torch.device,
) -> Gather | None:
    """What makes of x what the product reads: columns in the weight's order, or scaled; None where it reads x itself.

    Args:
        packed: the weight.
        config: how it is computed.
        tokens: M.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        device: of x.
    """
    scaled = scales_input(packed, config)
    if packed.permutation is None and not scaled:
        return None
    return Gather(packed, tokens, stride, kind, device, scaled=scaled)


class HopperProduct:
    """The launches of a product, with all but x, bias and result known.

    Args:
        packed: the weight.
        tokens: M.
        stride: from row to row of x, which is what `gather` made where that is not None.
        x_dtype: float16 or bfloat16.
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
        x_dtype: torch.dtype,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
        device: torch.device,
        split_k: int,
        config: GemmConfig,
    ):
        rows = self.rows = packed.out_features
        self.parts = (split_k, tokens, rows)
        self.sum = Sum(split_k, tokens, rows, out_dtype, bias, device) if split_k > 1 else None
        self.multiply = hopper.Multiply(
            packed,
            tokens,
            stride,
            x_dtype,
            out_dtype if self.sum is None else torch.float32,
            None if bias is None or self.sum is not None else tensor_class(bias),
            device,
            block_m=config.block_m,
            block_n=config.block_n,
            warps=config.warps,
            stages=config.stages,
            tiles=config.tiles,
            split_k=split_k,
            scaled=scales_input(packed, config),
            overlapped=True,
        )

    @property
    def scratch(self) -> int:
        """Bytes of the parts of the sums."""
        split_k, tokens, rows = self.parts
        return 0 if self.sum is None else split_k * tokens * rows * 4

    def run(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Launches by Triton."""
        if self.sum is None:
            self.multiply(x, bias, out)
        else:
            parts = torch.empty(self.parts, dtype=torch.float32, device=x.device)
            self.multiply(x, None, parts)
            self.sum(parts, bias, out)

    def ready(self, x: Any, bias: Any, out: Any, parts: Slot) -> list[Ready | None]:
        """The launches once they were compiled, of tensors or of what stands for them."""
        if self.sum is None:
            return [self.multiply.launch.ready(self.multiply.arguments(x, bias, out))]
        return [
            self.multiply.launch.ready(self.multiply.arguments(x, None, parts)),
            self.sum.launch.ready(self.sum.arguments(parts, bias, out)),
        ]

    def converted_scale(self) -> torch.Tensor | None:
        """The column scales, where the launches read a copy of them in another dtype."""
        scale = self.multiply.col_scale
        if scale is None or column_scales(scale, self.multiply.dtype).data_ptr() == scale.data_ptr():
            return None
        return scale


def converted_scales(products: Sequence[HopperProduct]) -> list[torch.Tensor]:
    """`converted_scale` of those that have one."""
    found = [product.converted_scale() for product in products]
    return [scale for scale in found if scale is not None]
