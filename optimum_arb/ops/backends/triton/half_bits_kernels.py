"""The two kernels for five to sixteen tokens: inputs in the tensor cores' order, and sign bits as float16 times them.

`_prepare` scales the inputs by the column scales, brings each tile of 128 columns to a power of two that suits float16,
and writes it in the order of the tensor cores' operand. A program of `_multiply` copies what this is of a slice of the
columns into shared memory; each of its warps then multiplies 32 rows of that slice, whose sign words it reads once, in
the order of `prepack`, for all tokens. The row scales multiply the sums of each tile in float32.
"""

# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import half_bits_tiles, half_bits_warpgroup
from .half_bits_inputs import CHUNK, WARPGROUP_CHUNK, copy_inputs, copy_warpgroup_inputs
from .prepack import ROWS, SLOTS
from .prepacked_tiles import first_scale, load_tile, part_of, scale_values

_CHUNK = gl.constexpr(CHUNK)
_WARPGROUP_CHUNK = gl.constexpr(WARPGROUP_CHUNK)
_SLOTS = gl.constexpr(SLOTS)
_ROWS = gl.constexpr(ROWS)
_WAIT = gl.constexpr("{ griddepcontrol.wait; mov.b32 $0, $1; }")


@triton.jit(do_not_specialize=["T", "x_stride", "M"])
def _prepare(
    x_ptr,
    scale_ptr,
    index_ptr,
    out_ptr,
    T,
    x_stride,
    M,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    INDEXED: tl.constexpr,
    OVERLAP: tl.constexpr,
    WARPGROUPS: tl.constexpr,
):
    """x [M, K] to words [PARTS * INPUTS, T, ceil(M / 8), CHUNK]. Grid (T, ceil(M / 8), PARTS * INPUTS).

    OVERLAP: this is launched while what writes x still runs, and lets `_multiply` begin, which reads nothing but
    weights until this has ended.
    WARPGROUPS: for products of warpgroups: [PARTS * INPUTS, T, ceil(M / 8) * WARPGROUP_CHUNK].
    """
    if OVERLAP:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    source = tl.program_id(2)
    quarter = tl.arange(0, 4)[:, None, None]
    g = tl.arange(0, 8)[None, :, None]
    r = tl.arange(0, 32)[None, None, :]
    if WARPGROUPS:
        # of 16 columns a step, + 0 and + 2 of each four, then + 1 and + 3
        bit = quarter * 2 + (r >> 4)
        slot = bit * 16 + (r >> 1 & 3) * 4 + (r >> 3 & 1) + (r & 1) * 2
    else:
        # within a lane's four registers: step of two, columns + 0 and + 1, and in each register columns + 0 and + 2
        bit = quarter * 2 + (r >> 2 & 1)
        slot = bit * 16 + (r >> 3) * 4 + (r >> 1 & 1) + (r & 1) * 2
    token = tl.program_id(1) * 8 + g
    at = tile * 128 + slot
    column = at
    if INDEXED:
        column = tl.load(index_ptr + (source // INPUTS) * (T * 128) + at)
    scale = tl.load(scale_ptr + source * (T * 128) + at)
    there = (token < M) & (scale != 0)
    if OVERLAP:
        gdc_wait()
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=there, other=0).to(tl.float32)
    x = tl.where(there, x * scale, 0.0)
    # magnitudes are ordered like their bits, and NaN is above infinity
    largest = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), 0)
    exponent = tl.maximum(largest >> 23, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[None, :, None]
    step = ((127 + 14 - bit) << 23).to(tl.float32, bitcast=True)
    half = (x * inverse * step).to(tl.float16)
    weight = ((127 + bit - 25) << 23).to(tl.float32, bitcast=True)
    correction = -tl.sum(tl.sum(half.to(tl.float32) * weight, 2), 0)
    back = (exponent << 23).to(tl.float32, bitcast=True) * 2048.0
    back = tl.where(exponent >= 254, float("nan"), back)  # infinity, NaN, and what overflows with the next addition
    n = tl.arange(0, 8)
    chunks = tl.num_programs(1)
    if WARPGROUPS:
        # 64 columns of all tokens, then the others; a token's pieces of 16 bytes lie in an order of its own, so that
        # those of eight tokens are in different banks
        chunk = out_ptr + (source * T + tile) * (chunks * _WARPGROUP_CHUNK)
        piece = ((quarter & 1) * 4 + (r >> 3)) ^ g
        place = (quarter >> 1) * (chunks * 512) + tl.program_id(1) * 512 + g * 64 + piece * 8 + (r & 7)
        place = tl.max_contiguous(tl.multiple_of(place, [1, 1, 8]), [1, 1, 8])
        tl.store(chunk.to(tl.pointer_type(tl.float16)) + place, half)
        factors = chunk.to(tl.pointer_type(tl.float32)) + chunks * 512 + tl.program_id(1) * 8 + n
        tl.store(factors, back)
        tl.store(factors + chunks * 8, correction * back)
    else:
        chunk = out_ptr + ((source * T + tile) * chunks + tl.program_id(1)) * _CHUNK
        tl.store(chunk.to(tl.pointer_type(tl.float16)) + quarter * 256 + g * 32 + r, half)
        factors = chunk.to(tl.pointer_type(tl.float32)) + 512 + (n >> 1) * 4 + (n & 1)
        for twice in tl.static_range(2):
            tl.store(factors + 2 * twice, correction)
            tl.store(factors + 2 * twice + 16, back)


@gluon.jit
def _add_tile(
    sums, loaded, inputs, step,
    SCALE: gl.constexpr, INPUTS: gl.constexpr, TERMS: gl.constexpr, TOKEN_TILES: gl.constexpr, LAYOUT: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):  # fmt: skip
    if WARPGROUPS:
        sums = half_bits_warpgroup.add_tile(sums, loaded, inputs, step, SCALE, INPUTS, TERMS, TOKEN_TILES, LAYOUT)
    else:
        sums = half_bits_tiles.add_tile(sums, loaded, inputs, step, SCALE, INPUTS, TERMS, TOKEN_TILES, LAYOUT)
    return sums


@gluon.jit(do_not_specialize=["T", "G", "M", "size", "end0", "end1", "end2", "group1", "group2"])
def _multiply(
    input_ptr,
    words_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    T,
    G,
    M,
    size,
    end0,
    end1,
    end2,
    group1,
    group2,
    PLANES: gl.constexpr,
    ROW_SCALES: gl.constexpr,
    INPUTS: gl.constexpr,
    TERMS: gl.constexpr,
    TILES_PER_BLOCK: gl.constexpr,
    BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    WARPS: gl.constexpr,
    STEPS: gl.constexpr,
    AHEAD: gl.constexpr,
    ONE_ROUND: gl.constexpr,
    OVERLAP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):
    """One program: WARPS * 32 rows of the tiles of a slice, which are STEPS or fewer.

    Grid (ceil(G / WARPS), slices). A slice's sums are a result of its own, `size` elements behind the one before.
    Parts, AHEAD and ONE_ROUND: see `one_bit_kernels`.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    slot = gl.arange(0, _SLOTS, layout=gl.SliceLayout(0, layout))
    group = gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))

    first = gl.program_id(0) * WARPS
    slice = gl.program_id(1)
    slices = gl.num_programs(1)
    first_tile = slice * T // slices
    end = (slice + 1) * T // slices
    part, first_group, start, part_end = part_of(first, group1, group2, end0, end1, end2, PARTS)
    row_group = gl.expand_dims(gl.minimum(first + group, G - 1), 1)
    blocks = gl.cdiv(T, TILES_PER_BLOCK)
    words_at = words_ptr + (row_group * T + first_tile) * (PLANES * _SLOTS) + gl.expand_dims(slot, 0)
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    VALUES: gl.constexpr = scale_values(SCALE)
    scale_layout: gl.constexpr = gl.BlockedLayout([1, VALUES], [1, 32], [WARPS, 1], [1, 0])
    scale_lane = gl.arange(0, 32 * VALUES, layout=gl.SliceLayout(0, scale_layout))
    scale_group = gl.arange(0, WARPS, layout=gl.SliceLayout(1, scale_layout))
    scale_group = gl.expand_dims(gl.minimum(first + scale_group, G - 1), 1)
    scale_at = first_scale(scale_ptr, scale_group, scale_lane, blocks, ROW_SCALES)
    tile = first_tile + slot // _SLOTS
    scale_tile = first_tile + scale_lane // (32 * VALUES)
    if WARPGROUPS:
        sums = half_bits_warpgroup.no_sums(TOKEN_TILES, WARPS)
    else:
        sums = half_bits_tiles.no_sums(TOKEN_TILES, WARPS)

    ahead = ()
    for d in gl.static_range(AHEAD):
        ahead = ahead + (
            load_tile(
                words_at + d * (PLANES * _SLOTS), scale_at, tile + d, scale_tile + d, end, TILES_PER_BLOCK, PLANES,
                ROW_SCALES, VALUES,
            ),
        )  # fmt: skip
    zero = slot * 0
    if OVERLAP:
        zero = gl.inline_asm_elementwise(_WAIT, "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)
    inputs = ()
    for i in gl.static_range(INPUTS):
        if WARPGROUPS:
            source = input_ptr + (part * INPUTS + i) * T * (TOKEN_TILES * _WARPGROUP_CHUNK)
            inputs = inputs + (copy_warpgroup_inputs(source, zero, first_tile, end, STEPS, TOKEN_TILES, WARPS),)
        else:
            source = input_ptr + (part * INPUTS + i) * T * (TOKEN_TILES * _CHUNK)
            inputs = inputs + (copy_inputs(source, zero, first_tile, end, STEPS, TOKEN_TILES, WARPS),)
    async_copy.commit_group()
    async_copy.wait_group(0)
    if WARPGROUPS:
        fence_async_shared()  # their products read it in another way than it was written
    if ONE_ROUND:
        for d in gl.static_range(AHEAD):
            sums = _add_tile(sums, ahead[d], inputs, d, SCALE, INPUTS, TERMS, TOKEN_TILES, layout, WARPGROUPS)
    else:
        # as many steps as tiles are ahead, as in `one_bit_kernels`
        for first_step in range(0, gl.cdiv(T, slices), AHEAD):
            for d in gl.static_range(AHEAD):
                sums = _add_tile(
                    sums, ahead[0], inputs, first_step + d, SCALE, INPUTS, TERMS, TOKEN_TILES, layout, WARPGROUPS
                )
                following = first_step + d + AHEAD
                ahead = ahead[1:] + (
                    load_tile(
                        words_at + following * (PLANES * _SLOTS), scale_at, following + tile, following + scale_tile,
                        end, TILES_PER_BLOCK, PLANES, ROW_SCALES, VALUES,
                    ),
                )  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()  # not before: what follows would take the place of programs of this launch
    row = (first - first_group) * _ROWS + start
    out_ptr += slice * size
    if WARPGROUPS:
        half_bits_warpgroup.store(sums, out_ptr, bias_ptr, row, start, part_end, M, slice, BIAS, TOKEN_TILES, WARPS)
    else:
        half_bits_tiles.store(sums, out_ptr, bias_ptr, row, start, part_end, M, slice, BIAS, TOKEN_TILES, WARPS)
