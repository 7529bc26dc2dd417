"""What the kernels for few tokens load of prepacked weights: a warp's tile of sign words, and its row scales.

Both are loaded some tiles before they are used, the row scales as the 32-bit words in which they lie: of 16-bit values
the compiler would make registers of their own as soon as a loop hands them on, and so wait for memory there.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .prepack import ROWS, SLOTS

_SLOTS = gl.constexpr(SLOTS)
_ROWS = gl.constexpr(ROWS)


@gluon.constexpr_function
def scale_values(dtype):
    """32-bit words that hold a lane's row scales of a tile, which are four."""
    return 2 if dtype.primitive_bitwidth == 16 else 4


@gluon.jit
def part_of(first, group1, group2, end0, end1, end2, PARTS: gl.constexpr):
    """Of weights that were joined, which one the group of rows `first` is of.

    Returns:
        Its number, its first group of rows, and the first column of its results and the one behind the last.
    """
    part = 0
    first_group = 0
    start = 0
    end = end0
    if PARTS > 1:  # noqa: SIM102 (the outer condition is a constant of the compilation)
        if first >= group1:
            part = 1
            first_group = group1
            start = end0
            end = end1
    if PARTS > 2:  # noqa: SIM102
        if first >= group2:
            part = 2
            first_group = group2
            start = end1
            end = end2
    return part, first_group, start, end


@gluon.jit
def first_scale(scale_ptr, row_group, lane, blocks, SCALES: gl.constexpr):
    """Where the row scales of groups of rows `[groups, 1]` begin for lanes, of `scale_values` words each."""
    VALUES: gl.constexpr = scale_values(scale_ptr.dtype.element_ty)
    if VALUES == 2:
        scale_ptr = scale_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    thread = lane // VALUES % 32
    slot = gl.max_contiguous(gl.multiple_of(thread // 4 * VALUES + lane % VALUES, VALUES), VALUES)
    return scale_ptr + row_group * (blocks * (SCALES * 8 * VALUES)) + gl.expand_dims(slot, 0)


@gluon.jit
def load_tile(
    words_at, scale_at, tile, scale_tile, T, TILES_PER_BLOCK: gl.constexpr, PLANES: gl.constexpr, SCALES: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    """The words of each plane of a warp's tile, and its row scales, as they lie in memory.

    Args:
        words_at: of this tile, `[groups, lanes]`.
        scale_at: by `first_scale`.
        tile: the number of each lane's tile; zeros come where it is T or more.
        scale_tile: the same for the lanes of `scale_at`.
        T: tiles.
        TILES_PER_BLOCK: tiles that share a row scale.
        PLANES: sign planes.
        SCALES: row scales of a (row, block).
        VALUES: of `scale_values`.
    """
    there = gl.expand_dims(tile < T, 0)
    words = ()
    for p in gl.static_range(PLANES):
        words = words + (gl.load(words_at + p * _SLOTS, mask=there, other=0),)
    there = gl.expand_dims(scale_tile < T, 0)
    at = scale_at + gl.expand_dims(scale_tile // TILES_PER_BLOCK * (SCALES * 8 * VALUES), 0)
    scales = ()
    for s in gl.static_range(SCALES):
        scales = scales + (gl.load(at + s * (8 * VALUES), mask=there, other=0),)
    return words, scales


@gluon.jit
def row_scale(loaded, DTYPE: gl.constexpr, FACTOR: gl.constexpr, LAYOUT: gl.constexpr):
    """float32 `[groups, lanes of four]`: FACTOR times the row scales of `load_tile`."""
    found = loaded
    if scale_values(DTYPE) == 2:
        low = (loaded & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
        high = (loaded >> 16).to(gl.int16).to(DTYPE, bitcast=True)
        found = gl.reshape(gl.join(low, high), [loaded.shape[0], 2 * loaded.shape[1]])
    found = gl.convert_layout(found, LAYOUT, assert_trivial=True).to(gl.float32)
    if FACTOR != 1.0:
        found = found * FACTOR
    return found


@gluon.jit
def sign_word(words, MASK: gl.constexpr):
    """The product of the planes in MASK: equal signs give +1, so XNOR, and XOR of three."""
    found = words[0]
    count: gl.constexpr = (MASK & 1) + (MASK >> 1 & 1) + (MASK >> 2 & 1)
    if count == 1:
        if MASK == 2:
            found = words[1]
        if MASK == 4:
            found = words[2]
    else:
        if MASK & 1:
            found = words[0] ^ (words[1] if MASK & 2 else words[2])
        else:
            found = words[1] ^ words[2]
        if count == 3:
            found = found ^ words[2]
        else:
            found = found ^ -1
    return found
