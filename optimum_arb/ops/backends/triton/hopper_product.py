"""One product by `hopper.py` of an input whose columns are ready, which may leave parts of sums to be added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..packed import PackedWeight
from . import hopper
from .columns import column_scales
from .gemm_config import GemmConfig, scales_input
from .launch import tensor_class
from .native_launch import Slot
from .ready_launches import Step
from .sums import Parts

# Results of a tile whose sums in float32 need as much shared memory on their way out as a slot of the ring: three slots
# and they are 230 KB, of the 227 that a program may have.
LARGE_TILE = 256 * 128
# Whether products that follow one another without a launch between compute beside each other. Query, key and value of a
# 7B have 256 programs each at 16 tokens, for which 132 multiprocessors have some 400 places, and wait for memory in
# most of the 4 us that each takes: the three took 16.0 us for 22.4.
BESIDE = True


def row_pieces(rows: int, split_k: int, split_from: int) -> list[tuple[range, int]]:
    """The rows of the weight that one launch computes, and how many programs share the columns of their tiles."""
    if split_k == 1 or not split_from:
        return [(range(rows), split_k)]
    if split_from >= rows:
        return [(range(rows), 1)]
    return [(range(split_from), 1), (range(split_from, rows), split_k)]


def parts_bytes(rows: int, tokens: int, split_k: int, split_from: int) -> int:
    """What the parts of the sums take."""
    last, count = row_pieces(rows, split_k, split_from)[-1]
    return 0 if count == 1 else count * tokens * len(last) * 4


class _Piece:
    """The launch of some rows of the weight; arguments as of `HopperProduct`."""

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
        after_product: bool,
    ):
        x_dtype, out_dtype, device = kinds
        whole, count, self.first = packed.out_features, len(rows), rows.start
        if count < whole:
            row_scale = packed.row_scale[rows.start : rows.stop]
            packed = replace(packed, weight=packed.weight[rows.start : rows.stop], row_scale=row_scale)
        self.parts = Parts(split_k, count, bias, whole) if split_k > 1 else None
        few = rows.start and config.block_m * config.block_n >= LARGE_TILE
        self.multiply = hopper.Multiply(
            packed,
            tokens,
            stride,
            x_dtype,
            out_dtype if self.parts is None else torch.float32,
            None if bias is None or self.parts is not None else tensor_class(bias),
            device,
            block_m=config.block_m,
            block_n=config.block_n,
            warps=config.warps,
            stages=max(config.stages - 1, 1) if few else config.stages,
            tiles=config.tiles,
            split_k=split_k,
            scaled=scales_input(packed, config),
            overlapped=True,
            after_product=BESIDE and (after_product or rows.start > 0),
            out_stride=whole if self.parts is None else count,
        )


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
        stride: from row to row of x, which is what `columns.Gather` made.
        x_dtype: float16 or bfloat16.
        out_dtype: of the result.
        bias: one like those that are to be added, or None.
        device: of all tensors.
        split_k: programs that share the columns of an output tile, of rows from `config.split_from` on.
        config: how else.
        after_product: the launch before is another product, see `hopper.Multiply`.

    Attributes:
        parts: what is left to be added of the last rows, or None.
        scratch: bytes of it.
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
        after_product: bool = False,
    ):
        self.rows = packed.out_features
        self._sizes = out_dtype.itemsize, 0 if bias is None else bias.itemsize
        kinds = x_dtype, out_dtype, device
        self.pieces = [
            _Piece(packed, rows, tokens, stride, kinds, bias, parts, config, after_product)
            for rows, parts in row_pieces(packed.out_features, split_k, config.split_from)
        ]
        # only the last rows have parts, see `row_pieces`
        self.parts = self.pieces[-1].parts
        self.scratch = parts_bytes(self.rows, tokens, split_k, config.split_from)

    def launches(self, x: Any, bias: Any, out: Any, parts: Any) -> list[Step]:
        """Those that fill the result, or `parts` of it, of tensors or of what stands for them."""
        found = []
        for piece in self.pieces:
            if piece.parts is not None:
                found.append((piece.multiply.launch, piece.multiply.arguments(x, None, parts)))
                continue
            of_bias, of_out = self._rows_from(piece.first, bias, out)
            found.append((piece.multiply.launch, piece.multiply.arguments(x, of_bias, of_out)))
        return found

    def added(self, parts: Any, bias: Any, out: Any) -> tuple[Any, Any, Any]:
        """What `Sum` of `self.parts` takes."""
        return parts, *self._rows_from(self.pieces[-1].first, bias, out)

    def _rows_from(self, first: int, bias: Any, out: Any) -> tuple[Any, Any]:
        """The bias and the result `[M, N]` from this row of the weight on."""
        of_out, of_bias = self._sizes
        return _from(bias, first, of_bias), _from(out, first, of_out)

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
