"""The two kernels for five to sixteen tokens: inputs in the tensor cores' order, and sign bits as float16 times them.

`_prepare` scales the inputs by the column scales, brings each tile of 128 columns to a power of two that suits float16,
and writes it in the order of the tensor cores' operand; `_multiply` reads every sign word once, in the order of
`prepack`, for all tokens. The row scales multiply the sums of each tile in float32.
"""

# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import fragments
from .prepack import ROWS, SLOTS
from .prepacked_tiles import first_scale, load_tile, part_of, row_scale, scale_values, sign_word

_CHUNK = gl.constexpr(528)  # words of 8 tokens of a tile: 1024 halves, and scale and correction of each token
_SLOTS = gl.constexpr(SLOTS)
_ROWS = gl.constexpr(ROWS)
_TEXTS = gl.constexpr((*map(fragments.half_multiply, (1, 2)), *map(fragments.half_add_sum, (1, 2))))
_CONSTRAINTS = gl.constexpr(
    (*map(fragments.half_constraints, (1, 2)), *map(fragments.half_add_sum_constraints, (1, 2)))
)
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
):
    """x [M, K] to words [PARTS * INPUTS, T, ceil(M / 8), 528]. Grid (T, ceil(M / 8), PARTS * INPUTS).

    OVERLAP: this is launched while what writes x still runs, and lets `_multiply` begin, which reads nothing but
    weights until this has ended.
    """
    if OVERLAP:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    source = tl.program_id(2)
    quarter = tl.arange(0, 4)[:, None, None]
    g = tl.arange(0, 8)[None, :, None]
    r = tl.arange(0, 32)[None, None, :]
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
    chunk = out_ptr + ((source * T + tile) * tl.num_programs(1) + tl.program_id(1)) * 528
    tl.store(chunk.to(tl.pointer_type(tl.float16)) + quarter * 256 + g * 32 + r, half)
    weight = ((127 + bit - 25) << 23).to(tl.float32, bitcast=True)
    correction = -tl.sum(tl.sum(half.to(tl.float32) * weight, 2), 0)
    back = (exponent << 23).to(tl.float32, bitcast=True) * 2048.0
    back = tl.where(exponent >= 254, float("nan"), back)  # infinity, NaN, and what overflows with the next addition
    n = tl.arange(0, 8)
    factors = chunk.to(tl.pointer_type(tl.float32)) + 512 + (n >> 1) * 4 + (n & 1)
    tl.store(factors, back)
    tl.store(factors + 2, correction)


@gluon.jit
def _load_inputs(at, factor_at, there, TOKEN_TILES: gl.constexpr):
    """The 4 or 8 quads of an input's operand of a tile, and the 1 or 2 of scales and corrections."""
    x = ()
    f = ()
    for tile in gl.static_range(TOKEN_TILES):
        for q in gl.static_range(4):
            x = x + (gl.expand_dims(gl.load(at + (tile * _CHUNK + q * _SLOTS), mask=there, other=0), 0),)
        f = f + (gl.expand_dims(gl.load(factor_at + tile * _CHUNK, mask=there, other=0), 0),)
    return x, f


@gluon.jit
def _add(args, MEAN: gl.constexpr, TOKEN_TILES: gl.constexpr):
    """The sums of `fragments.half_multiply` or, of a mean, `fragments.half_add_sum`."""
    text: gl.constexpr = _TEXTS[2 * MEAN + TOKEN_TILES - 1]
    constraints: gl.constexpr = _CONSTRAINTS[2 * MEAN + TOKEN_TILES - 1]
    if TOKEN_TILES == 1:
        found = gl.inline_asm_elementwise(text, constraints, args, dtype=(gl.float32, gl.float32), is_pure=True, pack=4)
    else:
        found = gl.inline_asm_elementwise(
            text,
            constraints,
            args,
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=True,
            pack=4,
        )
    return found


@gluon.jit
def _add_tile(
    sums, loaded, x, input_at, factor_at, step, warp, T,
    LAST: gl.constexpr, SCALE: gl.constexpr, INPUTS: gl.constexpr, TERMS: gl.constexpr, TOKEN_TILES: gl.constexpr,
    COLUMN_WARPS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums with the terms of a tile; and x, the operand of its first input, for the next tile, unless LAST.

    Each operand is loaded while the one before it is multiplied.
    """
    words, scales = loaded
    for i in gl.static_range(INPUTS):
        operand, factors = x
        if i + 1 < INPUTS:
            shift = ((i + 1) * T + step * COLUMN_WARPS) * (TOKEN_TILES * _CHUNK)
            x = _load_inputs(input_at + shift, factor_at + shift, step * COLUMN_WARPS + warp < T, TOKEN_TILES)
        elif not LAST:
            shift = (step + 1) * (COLUMN_WARPS * TOKEN_TILES * _CHUNK)
            x = _load_inputs(input_at + shift, factor_at + shift, (step + 1) * COLUMN_WARPS + warp < T, TOKEN_TILES)
        for j in gl.static_range(len(TERMS)):
            if TERMS[j][2] == i:
                scale = row_scale(scales[TERMS[j][1]], SCALE, TERMS[j][3], LAYOUT)
                if TERMS[j][0] == 0:
                    sums = _add(factors + (scale,) + sums, True, TOKEN_TILES)
                else:
                    sums = _add(
                        (sign_word(words, TERMS[j][0]),) + operand + factors + (scale,) + sums, False, TOKEN_TILES
                    )
    return sums, x


@gluon.jit
def _results(low, high, GROUPS: gl.constexpr, COLUMN_WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The sums of rows 0-15 and 16-31 of each group, [GROUPS, lanes], to [8 tokens, GROUPS * 32]."""
    sums = gl.join(low, high)
    sums = gl.sum(gl.reshape(sums, [GROUPS, COLUMN_WARPS, 8, 4, 2, 2, 2]), 1)  # groups, g, t, half, column, pair
    sums = gl.permute(sums, (2, 4, 0, 5, 3, 1))
    return gl.convert_layout(gl.reshape(sums, [8, GROUPS * _ROWS]), LAYOUT)


@gluon.jit
def _store(out, out_ptr, bias_ptr, row, start, end, M, first_token, BIAS: gl.constexpr, LAYOUT: gl.constexpr):
    token = first_token + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
    if BIAS:
        out += gl.expand_dims(gl.load(bias_ptr + row, mask=row < end, other=0.0).to(gl.float32), 0)
    at = out_ptr + start * M + gl.expand_dims(token * (end - start), 1) + gl.expand_dims(row - start, 0)
    there = gl.expand_dims(row < end, 0) & gl.expand_dims(token < M, 1)
    gl.store(at, out.to(out_ptr.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=["T", "G", "M", "end0", "end1", "end2", "group1", "group2"])
def _multiply(
    input_ptr,
    words_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    T,
    G,
    M,
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
    GROUPS: gl.constexpr,
    ROW_WARPS: gl.constexpr,
    COLUMN_WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    ONE_ROUND: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One program: GROUPS * ROW_WARPS * 32 rows of all tiles. Parts, AHEAD and ONE_ROUND: see `one_bit_kernels`."""
    ALL: gl.constexpr = GROUPS * ROW_WARPS
    LANES: gl.constexpr = COLUMN_WARPS * _SLOTS
    layout: gl.constexpr = gl.BlockedLayout([GROUPS, 4], [1, 32], [ROW_WARPS, COLUMN_WARPS], [1, 0])
    lane_layout: gl.constexpr = gl.SliceLayout(0, layout)
    lane = gl.arange(0, LANES, layout=lane_layout)
    warp = lane // _SLOTS
    slot = lane % _SLOTS
    group = gl.arange(0, ALL, layout=gl.SliceLayout(1, layout))

    first = gl.program_id(0) * ALL
    part, first_group, start, end = part_of(first, group1, group2, end0, end1, end2, PARTS)
    row_group = gl.expand_dims(gl.minimum(first + group, G - 1), 1)
    blocks = gl.cdiv(T, TILES_PER_BLOCK)
    words_at = words_ptr + row_group * (T * (PLANES * _SLOTS)) + gl.expand_dims(warp * (PLANES * _SLOTS) + slot, 0)
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    VALUES: gl.constexpr = scale_values(SCALE)
    scale_layout: gl.constexpr = gl.BlockedLayout([GROUPS, VALUES], [1, 32], [ROW_WARPS, COLUMN_WARPS], [1, 0])
    scale_lane = gl.arange(0, COLUMN_WARPS * (32 * VALUES), layout=gl.SliceLayout(0, scale_layout))
    scale_warp = scale_lane // (32 * VALUES)
    scale_group = gl.arange(0, ALL, layout=gl.SliceLayout(1, scale_layout))
    scale_group = gl.expand_dims(gl.minimum(first + scale_group, G - 1), 1)
    scale_at = first_scale(scale_ptr, scale_group, scale_lane, blocks, ROW_SCALES)
    zeros = gl.full([ALL, LANES], 0.0, gl.float32, layout=layout)
    sums = (zeros, zeros)
    if TOKEN_TILES == 2:
        sums = (zeros, zeros, zeros, zeros)

    ahead = ()
    for d in gl.static_range(AHEAD):
        ahead = ahead + (
            load_tile(
                words_at + d * (COLUMN_WARPS * PLANES * _SLOTS), scale_at, warp + d * COLUMN_WARPS,
                scale_warp + d * COLUMN_WARPS, T, TILES_PER_BLOCK, PLANES, ROW_SCALES, VALUES,
            ),
        )  # fmt: skip
    input_slot = slot
    if OVERLAP:
        zero = gl.inline_asm_elementwise(_WAIT, "=r,r", [lane * 0], dtype=gl.int32, is_pure=False, pack=1)
        input_slot = slot + gl.max_constancy(gl.multiple_of(zero, [128]), [128])
    factor_slot = gl.max_contiguous(gl.multiple_of(input_slot % 16, 4), 4)
    input_at = input_ptr + (part * (INPUTS * T) + warp) * (TOKEN_TILES * _CHUNK)
    factor_at = input_at + (512 + factor_slot)
    input_at += input_slot

    x = _load_inputs(input_at, factor_at, warp < T, TOKEN_TILES)
    if ONE_ROUND:
        for d in gl.static_range(AHEAD):
            sums, x = _add_tile(
                sums, ahead[d], x, input_at, factor_at, d, warp, T,
                d + 1 == AHEAD, SCALE, INPUTS, TERMS, TOKEN_TILES, COLUMN_WARPS, layout,
            )  # fmt: skip
    else:
        # as many steps as tiles are ahead, as in `one_bit_kernels`
        for first_step in range(0, gl.cdiv(T, COLUMN_WARPS), AHEAD):
            for d in gl.static_range(AHEAD):
                sums, x = _add_tile(
                    sums, ahead[0], x, input_at, factor_at, first_step + d, warp, T,
                    False, SCALE, INPUTS, TERMS, TOKEN_TILES, COLUMN_WARPS, layout,
                )  # fmt: skip
                following = (first_step + d + AHEAD) * COLUMN_WARPS
                ahead = ahead[1:] + (
                    load_tile(
                        words_at + following * (PLANES * _SLOTS), scale_at, following + warp, following + scale_warp, T,
                        TILES_PER_BLOCK, PLANES, ROW_SCALES, VALUES,
                    ),
                )  # fmt: skip
    out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, ROW_WARPS * COLUMN_WARPS], [1, 0])
    row = (first - first_group) * _ROWS + start + gl.arange(0, ALL * _ROWS, layout=gl.SliceLayout(0, out_layout))
    for tile in gl.static_range(TOKEN_TILES):
        out = _results(sums[2 * tile], sums[2 * tile + 1], ALL, COLUMN_WARPS, out_layout)
        _store(out, out_ptr, bias_ptr, row, start, end, M, 8 * tile, BIAS, out_layout)
