"""The dense weight from a packed one, on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..packed import PackedWeight
from .decode import arguments, decode_tile
from .launch import Launch, Launcher, cdiv, tensor_class

# Rows of a program and its warps. [K, N] takes more rows: they are the contiguous direction of its stores.
# With fewer warps the compiler gives a thread many columns, whose scales it then loads one by one.
ROWS, WARPS = 64, 8
TRANSPOSED_ROWS, TRANSPOSED_WARPS = 128, 8


@triton.jit
def _dequantize_kernel(
    out,
    permutation,
    weight,
    row_scale,
    col_scale,
    salient_columns,
    salient_weight,
    salient_col_scale,
    N,
    K,
    weight_stride,
    row_stride,
    tiles_per_block,
    salient,
    salient_stride,
    TERMS: tl.constexpr,
    PLANES: tl.constexpr,
    SALIENT_PLANES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COL_SCALES: tl.constexpr,
    SALIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    PERMUTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out[n, k] or, TRANSPOSED, out[k, n]; a program is ROWS rows of one tile. Neighbouring programs share rows, so
    that the rows that they write are whole soon."""
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(n, N - 1)
    packed = (
        weight, row_scale, col_scale, salient_columns, salient_weight, salient_col_scale,
        K, weight_stride, row_stride, tiles_per_block, salient, salient_stride,
    )  # fmt: skip
    # EVEN: there is no narrow tile, whose branch would take as many registers again
    if EVEN or tile < K // TILE:
        w = decode_tile(
            packed,
            rows,
            tile,
            TERMS,
            PLANES,
            SALIENT_PLANES,
            ROW_SCALES,
            COL_SCALES,
            SALIENT,
            ONE_BLOCK,
            TILE,
            WORDS,
            True,
        )
    else:
        w = decode_tile(
            packed,
            rows,
            tile,
            TERMS,
            PLANES,
            SALIENT_PLANES,
            ROW_SCALES,
            COL_SCALES,
            SALIENT,
            ONE_BLOCK,
            TILE,
            WORDS,
            False,
        )
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < K
    if PERMUTED:
        # int16 holds columns up to 32767
        column = tl.load(permutation + column, mask=inside, other=0)
    column = column.to(tl.int64)
    w = w.to(out.dtype.element_ty)
    if TRANSPOSED:
        tl.store(out + column[:, None] * N + n[None, :], tl.trans(w), mask=inside[:, None] & (n < N)[None, :])
    else:
        tl.store(out + n[:, None] * K + column[None, :], w, mask=(n < N)[:, None] & inside[None, :])


_dequantize = Launcher(_dequantize_kernel)


def dequantize(
    packed: PackedWeight, dtype: torch.dtype, *, transposed: bool = False, stored_order: bool = False
) -> torch.Tensor:
    """The weight that `packed` stands for, computed in float32 and rounded once.

    A permutation costs nothing in `[K, N]`, whose rows are written whole wherever they belong; in `[N, K]` its single
    elements are scattered.

    Args:
        packed: the weight.
        dtype: float16, bfloat16 or float32.
        transposed: `[K, N]` instead of `[N, K]`.
        stored_order: leave the columns in the order in which they are stored.

    Returns:
        A new contiguous tensor on the weight's device.
    """
    return Dequantize(packed, dtype, transposed=transposed, stored_order=stored_order)()


class Dequantize:
    """`dequantize`, whose parameters these are, with all but the result known; the weight may be written meanwhile.

    Tensors of it that are not contiguous are read as they were when this was made.
    """

    def __init__(
        self, packed: PackedWeight, dtype: torch.dtype, *, transposed: bool = False, stored_order: bool = False
    ):
        rows, columns = packed.out_features, packed.in_features
        device = packed.weight.device
        args = arguments(packed)
        per_program = TRANSPOSED_ROWS if transposed else ROWS
        permutation = None if stored_order else packed.permutation
        self._shape, self._dtype, self._device = (columns, rows) if transposed else (rows, columns), dtype, device
        self._rest = (
            packed.weight if permutation is None else permutation,
            *args.tensors,
            *args.sizes,
            *args.constants.values(),
            permutation is not None,
            transposed,
            columns % args.constants["TILE"] == 0,
            per_program,
        )
        self._launch = Launch(
            _dequantize,
            (dtype, transposed, None if permutation is None else tensor_class(permutation), args.key),
            (cdiv(columns, args.constants["TILE"]), cdiv(rows, per_program), 1),
            device,
            num_warps=TRANSPOSED_WARPS if transposed else WARPS,
        )

    def __call__(self) -> torch.Tensor:
        out = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._launch((out, *self._rest))
        return out
