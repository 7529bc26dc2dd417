"""One product by `hopper.py` of an input whose columns are ready: the product, and the sum of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
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


# Results of a tile whose sums in float32 need as much shared memory on their way out as a slot of the ring: three slots
# and they are 230 KB, of the 227 that a program may have.
LARGE_TILE = 256 * 128


def row_pieces(rows: int, split_k: int, split_from: int) -> list[tuple[range, int]]:
    """The rows of the weight that one launch computes, and how many programs share the columns of their tiles."""
    if split_k == 1 or not split_from:
        return [(range(rows), split_k)]
    if split_from >= rows:
        return [(range(rows), 1)]
    return [(range(split_from), 1), (range(split_from, rows), split_k)]


class _Piece:
    """The launches of some rows of the weight; arguments as of `HopperProduct`."""

    def __init__(
        self,
        packed: PackedWeight,
        rows: range,
        tokens: int,
        stride: int,
        kinds: tuple[torch.dtype, torch.dtype, torch.device],
        bias: torch.Tensor | None,
        split_k: int,
        config: GemmConfig,
    ):
        x_dtype, out_dtype, device = kinds
        whole, count, self.first = packed.out_features, len(rows), rows.start
        if count < whole:
            row_scale = packed.row_scale[rows.start : rows.stop]
            packed = replace(packed, weight=packed.weight[rows.start : rows.stop], row_scale=row_scale)
        self.parts = (split_k, tokens, count)
        self.sum = Sum(split_k, tokens, count, out_dtype, bias, device, whole) if split_k > 1 else None
        few = rows.start and config.block_m * config.block_n >= LARGE_TILE
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
            stages=max(config.stages - 1, 1) if few else config.stages,
            tiles=config.tiles,
            split_k=split_k,
            scaled=scales_input(packed, config),
            overlapped=True,
            out_stride=whole if self.sum is None else count,
        )

    @property
    def scratch(self) -> int:
        split_k, tokens, rows = self.parts
        return 0 if self.sum is None else split_k * tokens * rows * 4


def _from(tensor: Any, first: int, itemsize: int) -> Any:
    """The tensor, or what stands for it, from this element of its last dimension on."""
    if tensor is None or not first:
        return tensor
    if isinstance(tensor, Slot):
        return Slot(tensor.address, tensor.offset + first * itemsize)
    return tensor[..., first:]


class HopperProduct:
    """The launches of a product, with all but x, bias and result known.

    Args:
        packed: the weight.
        tokens: M.
        stride: from row to row of x, which is what `gather` made.
        x_dtype: float16 or bfloat16.
        out_dtype: of the result.
        bias: one like those that are to be added, or None.
        device: of all tensors.
        split_k: programs that share the columns of an output tile, of rows from `config.split_from` on.
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
        self.rows = packed.out_features
        self._sizes = out_dtype.itemsize, 0 if bias is None else bias.itemsize
        kinds = x_dtype, out_dtype, device
        self.pieces = [
            _Piece(packed, rows, tokens, stride, kinds, bias, parts, config)
            for rows, parts in row_pieces(packed.out_features, split_k, config.split_from)
        ]

    @property
    def scratch(self) -> int:
        """Bytes of the parts of the sums."""
        return max(piece.scratch for piece in self.pieces)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Launches by Triton."""
        for piece, added, filled in self._each(bias, out.view(-1, self.rows)):
            if piece.sum is None:
                piece.multiply(x, added, filled)
            else:
                parts = torch.empty(piece.parts, dtype=torch.float32, device=x.device)
                piece.multiply(x, None, parts)
                piece.sum(parts, added, filled)

    def ready(self, x: Any, bias: Any, out: Any, parts: Slot) -> list[Ready | None]:
        """The launches once they were compiled, of tensors or of what stands for them."""
        found: list[Ready | None] = []
        for piece, added, filled in self._each(bias, out):
            if piece.sum is None:
                found.append(piece.multiply.launch.ready(piece.multiply.arguments(x, added, filled)))
                continue
            found.append(piece.multiply.launch.ready(piece.multiply.arguments(x, None, parts)))
            found.append(piece.sum.launch.ready(piece.sum.arguments(parts, added, filled)))
        return found

    def _each(self, bias: Any, out: Any) -> Iterator[tuple[_Piece, Any, Any]]:
        """The pieces, each with its part of the bias and of the result `[M, N]`, or of what stands for them."""
        of_out, of_bias = self._sizes
        for piece in self.pieces:
            yield piece, _from(bias, piece.first, of_bias), _from(out, piece.first, of_out)

    def converted_scale(self) -> torch.Tensor | None:
        """The column scales, where the launches read a copy of them in another dtype."""
        multiply = self.pieces[0].multiply
        scale = multiply.col_scale
        if scale is None or column_scales(scale, multiply.dtype).data_ptr() == scale.data_ptr():
            return None
        return scale


def converted_scales(products: Sequence[HopperProduct]) -> list[torch.Tensor]:
    """`converted_scale` of those that have one."""
    found = [product.converted_scale() for product in products]
    return [scale for scale in found if scale is not None]
