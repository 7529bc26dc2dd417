"""Where the kernels for five to sixteen tokens keep their inputs: in chunks of memory, and copied into shared memory.

A chunk is what 8 tokens are in a tile of 128 columns; `half_bits_kernels` and `half_bits_transformed` write them.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .prepack import SLOTS

# words of 8 tokens of a tile: 4 rows of 128 with 1024 halves, then 16 with their corrections, and 16 with their scales
CHUNK = 544
# the same for a product of warpgroups, whose chunks of all tokens lie together: 1024 halves, 8 scales, 8 corrections
WARPGROUP_CHUNK = 528
_CHUNK = gl.constexpr(CHUNK)
_WARPGROUP_CHUNK = gl.constexpr(WARPGROUP_CHUNK)
_SLOTS = gl.constexpr(SLOTS)
# Triton 3.9 has neither of the old names
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _rows(words):
    """`[rows, 1, 128]` for shared memory `[rows, 128]`: of these a row can be taken at an index that a run knows."""
    if _RENAMED:
        rows = words.reinterpret(words.dtype, [words.shape[0], 1, words.shape[1]], words.layout)
    else:
        rows = words._reinterpret(words.dtype, [words.shape[0], 1, words.shape[1]], words.layout)
    return rows


@gluon.jit
def copy_inputs(input_ptr, zero, first_tile, end, STEPS: gl.constexpr, TOKEN_TILES: gl.constexpr, WARPS: gl.constexpr):
    """Begins to copy the operands of a slice's tiles into shared memory, and their corrections and scales.

    Each by one operation: the compiler puts a barrier between two. What 16 words hold is the same for eight lanes, and
    is copied eight times, so that each loads 16 bytes of its own.

    Returns:
        int32 `[STEPS * TOKEN_TILES * 4, 1, 128]` and `[STEPS * TOKEN_TILES * 2, 1, 128]`.
    """
    shared: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, order=[1, 0])
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    CHUNKS: gl.constexpr = STEPS * TOKEN_TILES
    x = gl.allocate_shared_memory(gl.int32, [4 * CHUNKS, _SLOTS], shared)
    f = gl.allocate_shared_memory(gl.int32, [2 * CHUNKS, _SLOTS], shared)
    slot = gl.expand_dims(gl.arange(0, _SLOTS, layout=gl.SliceLayout(0, layout)) + zero, 0)
    slot = gl.max_contiguous(gl.multiple_of(slot, [1, 128]), [1, 128])
    input_ptr += first_tile * (TOKEN_TILES * _CHUNK)
    chunks = (end - first_tile) * TOKEN_TILES
    row = gl.expand_dims(gl.arange(0, 4 * CHUNKS, layout=gl.SliceLayout(1, layout)), 1)
    at = row // 4 * _CHUNK + row % 4 * _SLOTS + slot
    _copy(x, input_ptr + at, mask=row // 4 < chunks)
    row = gl.expand_dims(gl.arange(0, 2 * CHUNKS, layout=gl.SliceLayout(1, layout)), 1)
    slot = gl.max_contiguous(gl.multiple_of(slot % 16, [1, 4]), [1, 4])
    at = row // 2 * _CHUNK + row % 2 * 16 + 512 + slot
    _copy(f, input_ptr + at, mask=row // 2 < chunks)
    return _rows(x), _rows(f)


@gluon.jit
def load_inputs(copied, step, TOKEN_TILES: gl.constexpr, LAYOUT: gl.constexpr):
    """The 4 or 8 quads of an input's operand of a tile, and the 2 or 4 of corrections and scales."""
    x = ()
    f = ()
    for i in gl.static_range(4 * TOKEN_TILES):
        x = x + (copied[0].index(step * (4 * TOKEN_TILES) + i).load(LAYOUT),)
    for i in gl.static_range(2 * TOKEN_TILES):
        f = f + (copied[1].index(step * (2 * TOKEN_TILES) + i).load(LAYOUT),)
    return x, f


@gluon.jit
def copy_warpgroup_inputs(
    input_ptr, zero, first_tile, end, STEPS: gl.constexpr, TOKEN_TILES: gl.constexpr, WARPS: gl.constexpr
):
    """`copy_inputs` of what `_prepare` has written as the right operand of a product of warpgroups.

    Returns:
        float16 `[STEPS, TOKEN_TILES * 8, 128]`; float32 `[2 * STEPS, TOKEN_TILES * 8]`: the scales of a tile's tokens,
        then the corrections times these.
    """
    plain: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, order=[1, 0])
    vectors: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    operand: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    small: gl.constexpr = gl.BlockedLayout([1, 4], [8 // TOKEN_TILES, 4 * TOKEN_TILES], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = 4 * TOKEN_TILES
    TILE: gl.constexpr = TOKEN_TILES * _WARPGROUP_CHUNK
    x = gl.allocate_shared_memory(gl.int32, [STEPS * ROWS, _SLOTS], plain)
    f = gl.allocate_shared_memory(gl.int32, [STEPS, 16 * TOKEN_TILES], plain)
    slot = gl.expand_dims(gl.arange(0, _SLOTS, layout=gl.SliceLayout(0, layout)) + zero, 0)
    slot = gl.max_contiguous(gl.multiple_of(slot, [1, 128]), [1, 128])
    input_ptr += first_tile * TILE
    row = gl.expand_dims(gl.arange(0, STEPS * ROWS, layout=gl.SliceLayout(1, layout)), 1)
    _copy(x, input_ptr + (row // ROWS * TILE + row % ROWS * _SLOTS + slot), mask=row // ROWS < end - first_tile)
    row = gl.expand_dims(gl.arange(0, STEPS, layout=gl.SliceLayout(1, small)), 1)
    slot = gl.expand_dims(gl.arange(0, 16 * TOKEN_TILES, layout=gl.SliceLayout(0, small)), 0)
    _copy(f, input_ptr + (row * TILE + 512 * TOKEN_TILES + slot), mask=row < end - first_tile)
    if _RENAMED:
        x = x.reinterpret(gl.float16, [STEPS, 8 * TOKEN_TILES, _SLOTS], operand)
        f = f.reinterpret(gl.float32, [2 * STEPS, 8 * TOKEN_TILES], vectors)
    else:
        x = x._reinterpret(gl.float16, [STEPS, 8 * TOKEN_TILES, _SLOTS], operand)
        f = f._reinterpret(gl.float32, [2 * STEPS, 8 * TOKEN_TILES], vectors)
    return x, f
