"""Packed tiles to weights in registers on sm_90, in a layout from which rows are stored to shared memory."""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_decode import _asm, _constraints

PAIRS = gl.constexpr(8)  # of the 16 bytes of a row's tile
# Four bytes to two registers of two, each in the upper half of 16 bits; the first is written before the second is made.
SPREAD = gl.constexpr("prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;")
SPREAD_CONSTRAINTS = gl.constexpr("=&r,=r,r")


@gluon.constexpr_function
def _decode_layout(rows):
    """Weights [rows, 4 bits, 8 pairs of bytes]: a thread has four pairs, whose weights are 16 bytes of a row.

    Neighbouring lanes have neighbouring rows, which the swizzle puts into different banks; a warp's column scales are
    the same for all lanes.
    """
    down = [[64 << i, 0, 0] for i in range((rows // 64).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], *down],
        [[1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0], [16, 0, 0]],
        [[0, 0, 4], [32, 0, 0]],
        [],
        [rows, 4, 8],
    )


@gluon.jit
def _pairs(values, DTYPE: gl.constexpr):
    """Scales of rows, each in both halves of an int32: [rows, 1, 1]."""
    value = values.to(DTYPE).to(gl.int16, bitcast=True).to(gl.int32)
    value = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, 0x1010;", "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.expand_dims(gl.expand_dims(value, 1), 2)


@gluon.jit
def _load_bytes(
    bits, slot, P: gl.constexpr, PLANES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Plane P of a tile: int32 [rows, 1, 8], two bytes, each in the upper half of 16 bits."""
    if PLANES == 3:
        tile = bits.index(slot * PLANES + P)
    else:
        tile = bits.index(slot).slice(P * PAIRS, PAIRS, dim=1)
    found = tile.load(gl.SliceLayout(1, LAYOUT))
    found = gl.inline_asm_elementwise(SPREAD, SPREAD_CONSTRAINTS, [found], dtype=gl.int32, is_pure=True, pack=2)
    return gl.expand_dims(found, 1)


@gluon.jit
def _weights(
    bits, slot, scales, columns, HALF: gl.constexpr,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, MEAN: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The weights of columns 64 HALF to 64 HALF + 63 of a tile: int32 [rows, 32], two of them each."""
    asm: gl.constexpr = _asm(PLANES, COLUMNS, MEAN, gl.bfloat16 == DTYPE, -1)
    constraints: gl.constexpr = _constraints(2 * PLANES + MEAN + COLUMNS * PLANES + 1)
    args = (_load_bytes(bits, slot, 0, PLANES, LAYOUT),)
    if PLANES > 1:
        args = args + (_load_bytes(bits, slot, 1, PLANES, LAYOUT),)
    if PLANES > 2:
        args = args + (_load_bytes(bits, slot, 2, PLANES, LAYOUT),)
    for p in gl.static_range(PLANES):
        args = args + (_pairs(scales[p], DTYPE),)
    if MEAN:
        args = args + (_pairs(scales[3], DTYPE),)
    if COLUMNS:
        for p in gl.static_range(PLANES):
            args = args + (gl.expand_dims(columns[p], 0),)
    shift = 7 - 4 * HALF - gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    args = args + (gl.expand_dims(gl.expand_dims(shift, 0), 2),)
    w = gl.inline_asm_elementwise(asm, constraints, args, dtype=gl.int32, is_pure=True, pack=1)
    return w.reshape([w.shape[0], 4 * PAIRS])
