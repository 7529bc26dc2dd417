"""What `half_bits_kernels._multiply` adds of a tile: products of warps, `mma.sync`, of inputs in their registers."""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import fragments
from .half_bits_inputs import load_inputs
from .prepack import ROWS, SLOTS
from .prepacked_tiles import row_scale, sign_word

_SLOTS = gl.constexpr(SLOTS)
_ROWS = gl.constexpr(ROWS)
_TEXTS = gl.constexpr((*map(fragments.half_multiply, (1, 2)), *map(fragments.half_add_sum, (1, 2))))
_CONSTRAINTS = gl.constexpr(
    (*map(fragments.half_constraints, (1, 2)), *map(fragments.half_add_sum_constraints, (1, 2)))
)


@gluon.jit
def no_sums(TOKEN_TILES: gl.constexpr, WARPS: gl.constexpr):
    """Zeros: for each 8 tokens a float32 `[WARPS, 128]` of rows g and g + 8, and one of g + 16 and g + 24."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    zeros = gl.full([WARPS, _SLOTS], 0.0, gl.float32, layout=layout)
    sums = (zeros, zeros)
    if TOKEN_TILES == 2:
        sums = (zeros, zeros, zeros, zeros)
    return sums


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
def add_tile(
    sums, loaded, inputs, step,
    SCALE: gl.constexpr, INPUTS: gl.constexpr, TERMS: gl.constexpr, TOKEN_TILES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums with the terms of a tile."""
    words, scales = loaded
    for i in gl.static_range(INPUTS):
        operand, factors = load_inputs(inputs[i], step, TOKEN_TILES, LAYOUT)
        for j in gl.static_range(len(TERMS)):
            if TERMS[j][2] == i:
                scale = row_scale(scales[TERMS[j][1]], SCALE, TERMS[j][3], LAYOUT)
                if TERMS[j][0] == 0:
                    sums = _add(factors + (scale,) + sums, True, TOKEN_TILES)
                else:
                    sums = _add(
                        (sign_word(words, TERMS[j][0]),) + operand + factors + (scale,) + sums, False, TOKEN_TILES
                    )
    return sums


@gluon.jit
def _store_pair(
    sums, out_ptr, bias_ptr, first_row, start, end, M, first_token, slice,
    BIAS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Stores the sums of 16 rows of each warp's 32 and 8 tokens from where they are, without an exchange of lanes.

    Lane `4 g + t` has tokens 2 t and 2 t + 1 of row g, then of row g + 8.
    """
    lane = gl.expand_dims(gl.arange(0, _SLOTS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    warp = gl.expand_dims(gl.arange(0, WARPS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    row = first_row + warp * _ROWS + (lane // 16 + lane // 2 % 2 * 8)
    token = first_token + lane // 4 % 4 * 2 + lane % 2
    if BIAS:
        sums += gl.load(bias_ptr + row, mask=(row < end) & (slice == 0), other=0.0).to(gl.float32)
    at = out_ptr + start * M + token * (end - start) + (row - start)
    gl.store(at, sums.to(out_ptr.dtype.element_ty), mask=(row < end) & (token < M))


@gluon.jit
def store(
    sums, out_ptr, bias_ptr, row, start, end, M, slice,
    BIAS: gl.constexpr, TOKEN_TILES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Stores the sums of the rows from `row` on, of results whose first is `start`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    for i in gl.static_range(TOKEN_TILES):
        for pair in gl.static_range(2):
            _store_pair(
                sums[2 * i + pair], out_ptr, bias_ptr, row + 16 * pair, start, end, M, 8 * i, slice, BIAS, WARPS, layout
            )
