"""Packed tiles to weights in registers on sm_90, in the layout of a warpgroup product's left operand.

Signs are turned into weights two at a time, with one shift, one three-input logic operation and one multiply-add a
plane.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .available import triton_version

if triton_version() < (3, 6):  # layouts of shared memory took other arguments, of which this would fail on a GPU
    raise ImportError("The fused product on sm_90 needs Triton 3.6.")

TILE = gl.constexpr(128)
BYTES = gl.constexpr(16)


@gluon.constexpr_function
def _row_layout(rows, warps):
    """Bytes [rows, 16] of a plane's tile as the left operand of a product of 16 columns wants its elements."""
    repeats = [[16 * warps << i, 0] for i in range((rows // (16 * warps)).bit_length() - 1)]
    warp_bases = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8], *repeats], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], warp_bases, [], [rows, 16]
    )


@gluon.constexpr_function
def _asm(planes, columns, mean, bf16, bit):
    """Two weights from their bytes (each in the upper half of 16 bits), of which `bit` counts.

    Operands: the bytes of each plane, the row scales, the mean, the column scales of each plane.
    """
    kind = "bf16x2" if bf16 else "f16x2"
    first_row = 1 + planes
    first_col = first_row + planes + mean
    lines = [".reg .b32 t, w;"]
    for p in range(planes):
        if bit < 7:
            lines.append(f"shl.b32 t, ${1 + p}, {7 - bit};")
        value = f"${first_col + p if columns else first_row + p}"
        # (~t & 0x80008000) ^ value
        lines.append(f"lop3.b32 t, {'t' if bit < 7 else f'${1 + p}'}, 0x80008000, {value}, 0xA6;")
        row = f"${first_row + p}"
        if p == 0:
            if columns and mean:
                lines.append(f"fma.rn.{kind} w, t, {row}, ${first_row + planes};")
            elif columns:
                lines.append(f"mul.rn.{kind} w, t, {row};")
            elif mean:
                lines.append(f"add.rn.{kind} w, t, ${first_row + planes};")
            else:
                lines.append("mov.b32 w, t;")
        elif columns:
            lines.append(f"fma.rn.{kind} w, t, {row}, w;")
        else:
            lines.append(f"add.rn.{kind} w, w, t;")
    lines.append("mov.b32 $0, w;")
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def _constraints(count):
    return ",".join(["=r"] + ["r"] * count)


@gluon.jit
def _decode_bit(
    q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT: gl.constexpr,
    BIT: gl.constexpr, PLANES: gl.constexpr, COLUMNS: gl.constexpr, MEAN: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The weights [rows, 16] whose signs are bit BIT of the bytes q [rows, 16] (in the upper half of int16)."""
    asm: gl.constexpr = _asm(PLANES, COLUMNS, MEAN, gl.bfloat16 == DTYPE, BIT)
    count: gl.constexpr = 2 * PLANES + MEAN + COLUMNS * PLANES
    constraints: gl.constexpr = _constraints(count)
    args = (q0,)
    if PLANES > 1:
        args = args + (q1,)
    if PLANES > 2:
        args = args + (q2,)
    args = args + (r0,)
    if PLANES > 1:
        args = args + (r1,)
    if PLANES > 2:
        args = args + (r2,)
    if MEAN:
        args = args + (mean,)
    if COLUMNS:
        for p in gl.static_range(PLANES):
            c = columns.index(slot * PLANES + p).slice(BIT * BYTES, BYTES).load(gl.SliceLayout(0, LAYOUT))
            args = args + (gl.expand_dims(c, 0),)
    return gl.inline_asm_elementwise(asm, constraints, args, dtype=r0.dtype, is_pure=True, pack=2)


@gluon.jit
def _plane(
    bits, slot, T: gl.constexpr, P: gl.constexpr, PART: gl.constexpr,
    PLANES: gl.constexpr, TILES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Plane P of the T-th tile in this slot: int16 [rows, 16], the byte in the upper half."""
    ROWS: gl.constexpr = LAYOUT.shape[0]
    if PLANES == 3:
        tile = bits.index((slot * TILES + T) * PLANES + P)
    else:
        tile = bits.index(slot).slice((T * PLANES + P) * BYTES, BYTES, dim=1)
    return tile.slice(PART * ROWS, ROWS, dim=0).load(LAYOUT).to(gl.int16) << 8


@gluon.jit
def _decode(
    bits, columns, slot, scales, T: gl.constexpr, PART: gl.constexpr,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, MEAN: gl.constexpr, DTYPE: gl.constexpr, TILES: gl.constexpr,
    LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """The weights [rows, 128] of the T-th tile in this slot, as the left operand of a product."""
    q0 = _plane(bits, slot, T, 0, PART, PLANES, TILES, LAYOUT)
    q1 = q0
    q2 = q0
    if PLANES > 1:
        q1 = _plane(bits, slot, T, 1, PART, PLANES, TILES, LAYOUT)
    if PLANES > 2:
        q2 = _plane(bits, slot, T, 2, PART, PLANES, TILES, LAYOUT)
    r0 = gl.expand_dims(scales[0], 1)
    r1 = gl.expand_dims(scales[1], 1)
    r2 = gl.expand_dims(scales[2], 1)
    mean = gl.expand_dims(scales[3], 1)
    slot = slot * TILES + T
    w0 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 0, PLANES, COLUMNS, MEAN, DTYPE)
    w1 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 1, PLANES, COLUMNS, MEAN, DTYPE)
    w2 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 2, PLANES, COLUMNS, MEAN, DTYPE)
    w3 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 3, PLANES, COLUMNS, MEAN, DTYPE)
    w4 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 4, PLANES, COLUMNS, MEAN, DTYPE)
    w5 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 5, PLANES, COLUMNS, MEAN, DTYPE)
    w6 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 6, PLANES, COLUMNS, MEAN, DTYPE)
    w7 = _decode_bit(q0, q1, q2, r0, r1, r2, mean, columns, slot, LAYOUT, 7, PLANES, COLUMNS, MEAN, DTYPE)
    even = gl.join(gl.join(w0, w4), gl.join(w2, w6))
    odd = gl.join(gl.join(w1, w5), gl.join(w3, w7))
    w = gl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(w0.shape[0], TILE)
    return gl.convert_layout(w, OPERAND, assert_trivial=True)


@gluon.jit
def _load_scales(
    pointer, tile, tiles_per_block, last,
    PLANES: gl.constexpr, SPREAD: gl.constexpr, SCALES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The row scales of this tile's block, and its mean (the first scale where there is none).

    Where SPREAD is not 1, `tile` counts the planes' tiles one by one, and this is the scale of one plane.
    """
    at = pointer + gl.minimum(tile // SPREAD // tiles_per_block, last) * SCALES + tile % SPREAD
    r0 = gl.load(at).to(DTYPE)
    r1 = r0
    r2 = r0
    mean = r0
    if PLANES > 1:
        r1 = gl.load(at + 1).to(DTYPE)
    if PLANES > 2:
        r2 = gl.load(at + 2).to(DTYPE)
    if SCALES > PLANES * SPREAD:
        mean = gl.load(at + PLANES).to(DTYPE)
    return r0, r1, r2, mean
