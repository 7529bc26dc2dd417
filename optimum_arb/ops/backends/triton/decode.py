"""From packed bytes to a tile of the weight in registers: the part that the Triton kernels share.

`arguments` turns a `PackedWeight` into what a kernel takes. `decode_tile` computes, in float32 and for every layout,

    w[n, k] = sum over terms of  factor * row_scale[n, block(k), row] * col_scale[col, k] * zone(k) * sign[n, k]

for some rows and the columns of one packing tile. A sign is applied by exclusive-or into the top bit of the scale, and
the product of several planes is the exclusive-or of their bits, so a term costs about four instructions a weight.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ....format.layout import Layout, layout_from_name
from ....format.packing import TILE, packed_bytes, tile_width
from ..packed import PackedWeight
from .launch import tensor_class

ZONES = {"all": 0, "rest": 1, "salient": 2}


class Arguments(NamedTuple):
    """What a kernel is launched with to read a weight: `tensors` and `sizes` in the order of its parameters,
    `constants`, its compile-time ones, in theirs too, and `key`, which tells weights apart that it is compiled for
    (see `Launcher`)."""

    tensors: tuple[torch.Tensor, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    key: Hashable


@cache
def _terms(layout: Layout) -> tuple[tuple[int, int, int, int, float], ...]:
    """(planes as a bit mask, row, col or -1, zone, factor) of each term.

    The kernels flip the scale's sign where the exclusive-or of the planes' bits is 1, which is where the product of
    their signs is +1 (an odd number of planes) or -1 (an even number): the factor's sign makes up for it.
    """
    return tuple(
        (
            sum(1 << p for p in term.planes),
            term.row,
            -1 if term.col is None else term.col,
            ZONES[term.zone],
            term.factor * (-1) ** len(term.planes),
        )
        for term in layout.terms
    )


def arguments(packed: PackedWeight) -> Arguments:
    """The parameters of `decode_tile`; tensors that the layout lacks are stood in for by the weight."""
    absent = packed.weight
    salient = packed.salient_columns
    values = (
        absent,
        packed.row_scale,
        packed.col_scale,
        salient,
        packed.salient_weight,
        packed.salient_col_scale,
    )
    tensors = tuple(absent if value is None else value.contiguous() for value in values)
    form = (
        packed.layout.name,
        packed.block_size,
        packed.out_features,
        packed.in_features,
        absent.shape[1],
        packed.row_scale.shape[1],
        0 if salient is None else salient.shape[1],
        absent.shape[1] % 4 == 0 and absent.data_ptr() % 4 == 0,
    )
    sizes, constants = _sizes_and_constants(*form)
    return Arguments(tensors, sizes, constants, (form, *map(tensor_class, tensors)))


@cache
def _sizes_and_constants(
    name: str, block_size: int, rows: int, columns: int, weight_stride: int, row_stride: int, salient: int, words: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    layout, tile = layout_from_name(name), tile_width(block_size)
    sizes = (
        rows,
        columns,
        weight_stride,
        row_stride,
        max(columns // tile, 1) if block_size == -1 else block_size // tile,
        salient,
        layout.salient_planes * packed_bytes(salient, tile),
    )
    constants = {
        "TERMS": _terms(layout),
        "PLANES": layout.planes,
        "SALIENT_PLANES": layout.salient_planes,
        "ROW_SCALES": layout.row_scales,
        "COL_SCALES": layout.col_scales,
        "SALIENT": layout.salient,
        "ONE_BLOCK": block_size == -1,
        "TILE": tile,
        "WORDS": words,
    }
    return sizes, constants


assert TILE == 128  # `decode_tile` is written for tiles of 128 and 64 columns


@triton.jit
def _plane_bits(
    base, b, k, width, p, PLANES: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr
):
    """uint32 [rows, TILE] whose top bit is 1 where the sign of plane p is +1 (other bits: rubbish)."""
    if WHOLE and WORDS:
        # four bytes at once: bit 8 c + j of word i is column 16 j + 4 i + c (of 128; 8 j + 4 i + c of 64)
        NWORDS: tl.constexpr = TILE // 32
        i = tl.arange(0, NWORDS)
        words = base.to(tl.pointer_type(tl.uint32), bitcast=True)
        word = tl.load(words + p * NWORDS + i[None, :])
        left = 31 - k % 4 * 8 - k // (TILE // 8)
        spread = word[:, None, :, None] << tl.reshape(left.to(tl.uint32), (1, 8, NWORDS, 4))
        bits = tl.reshape(spread, (word.shape[0], TILE))
    elif WHOLE:
        NBYTES: tl.constexpr = TILE // 8
        i = tl.arange(0, NBYTES)
        j = tl.arange(0, 8)
        byte = tl.load(base + p * NBYTES + i[None, :]).to(tl.uint32)
        spread = byte[:, None, :] << (31 - j).to(tl.uint32)[None, :, None]
        bits = tl.reshape(spread, (byte.shape[0], TILE))
    else:
        j = tl.minimum(k // b, 7)
        i = k - k // b * b
        byte = tl.load(base + p * b + i[None, :], mask=(k < width)[None, :], other=0).to(tl.uint32)
        bits = byte << (31 - j).to(tl.uint32)[None, :]
    return bits


@triton.jit
def _salient_index(columns, salient, k):
    """For each column of k: how many salient columns are below it, and whether it is one (binary search)."""
    low = tl.zeros_like(k)
    high = low + salient
    step = salient
    while step > 0:
        middle = (low + high) // 2
        found = tl.load(columns + middle, mask=middle < high, other=0x7FFF).to(tl.int32)
        below = (middle < high) & (found < k)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        step = step // 2
    here = tl.load(columns + low, mask=low < salient, other=-1).to(tl.int32)
    return low, here == k


@triton.jit
def _salient_bits(weight, rows, index, inside, salient, stride, p, SALIENT_PLANES: tl.constexpr, TILE: tl.constexpr):
    """As `_plane_bits`, for plane p of the salient columns, gathered by their index."""
    whole = salient // TILE
    tile = index // TILE
    width = tl.where(tile < whole, TILE, salient - whole * TILE)
    b = tl.maximum((width + 7) // 8, 1)
    at = index - tile * TILE
    j = tl.minimum(at // b, 7)
    offset = tile * (SALIENT_PLANES * (TILE // 8)) + p * b + at % b
    byte = tl.load(weight + rows[:, None] * stride + offset[None, :], mask=inside[None, :], other=0).to(tl.uint32)
    return byte << (31 - j).to(tl.uint32)[None, :]


@triton.jit
def decode_tile(
    packed,
    rows,
    tile,
    TERMS: tl.constexpr,
    PLANES: tl.constexpr,
    SALIENT_PLANES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COL_SCALES: tl.constexpr,
    SALIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """float32 [rows, TILE]: the weight's rows `rows` (int64, in range) at the columns of tile number `tile`.

    packed: what `arguments` has as tensors and sizes, but for N.
    WHOLE: the tile has all its columns. Otherwise it is the narrow last one; columns past K are finite rubbish.
    """
    (
        weight, row_scale, col_scale, salient_columns, salient_weight, salient_col_scale,
        K, weight_stride, row_stride, tiles_per_block, salient, salient_stride,
    ) = packed  # fmt: skip
    k = tl.arange(0, TILE)
    width = K - tile * TILE
    b = (width + 7) // 8
    base = weight + (rows * weight_stride + tile * (PLANES * (TILE // 8)))[:, None]
    bits0 = _plane_bits(base, b, k, width, 0, PLANES, TILE, WHOLE, WORDS)
    bits1 = bits0
    bits2 = bits0
    if PLANES > 1:
        bits1 = _plane_bits(base, b, k, width, 1, PLANES, TILE, WHOLE, WORDS)
    if PLANES > 2:
        bits2 = _plane_bits(base, b, k, width, 2, PLANES, TILE, WHOLE, WORDS)
    column = tile * TILE + k
    valid = column < K
    if SALIENT:
        index, inside = _salient_index(salient_columns, salient, column)
        if SALIENT_PLANES > 0:
            extra = _salient_bits(salient_weight, rows, index, inside, salient, salient_stride, 0, SALIENT_PLANES, TILE)
            if PLANES == 1:
                bits1 = extra
            else:
                bits2 = extra
    block = 0 if ONE_BLOCK else tile // tiles_per_block
    scales = row_scale + rows * row_stride + block * ROW_SCALES
    result = tl.zeros([rows.shape[0], TILE], tl.float32)
    for t in tl.static_range(len(TERMS)):
        # no constexpr may be given a name here: compiled, the second term's would be refused as an assignment to it
        value = (tl.load(scales + TERMS[t][1]).to(tl.float32) * TERMS[t][4])[:, None]
        if TERMS[t][2] >= 0:
            if TERMS[t][2] < COL_SCALES:
                c = tl.load(col_scale + TERMS[t][2] * K + column, mask=valid, other=0).to(tl.float32)
            else:
                c = tl.load(salient_col_scale + (TERMS[t][2] - COL_SCALES) * salient + index, mask=inside, other=0).to(
                    tl.float32
                )
            value = value * c[None, :]
        if TERMS[t][3] == 1:
            value = tl.where(inside[None, :], 0.0, value)
        elif TERMS[t][3] == 2:
            value = tl.where(inside[None, :], value, 0.0)
        value = tl.broadcast_to(value, (rows.shape[0], TILE))
        if TERMS[t][0] != 0:
            if TERMS[t][0] == 1:
                bits = bits0
            elif TERMS[t][0] == 2:
                bits = bits1
            elif TERMS[t][0] == 3:
                bits = bits0 ^ bits1
            elif TERMS[t][0] == 4:
                bits = bits2
            elif TERMS[t][0] == 5:
                bits = bits0 ^ bits2
            elif TERMS[t][0] == 6:
                bits = bits1 ^ bits2
            else:
                bits = bits0 ^ bits1 ^ bits2
            flipped = value.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)
            value = flipped.to(tl.float32, bitcast=True)
        if t == 0:
            result = value
        else:
            result += value
    return result
