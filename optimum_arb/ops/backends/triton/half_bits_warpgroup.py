"""`half_bits_tiles` on sm_90 for more than 8 tokens: masked signs are the register operand of warpgroup products.

Such a product takes its right operand, the inputs of a tile, from shared memory by itself, and signs of 16 rows of a
warp for all tokens at once.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .prepack import ROWS, SLOTS
from .prepacked_tiles import row_scale, sign_word

_SLOTS = gl.constexpr(SLOTS)
_ROWS = gl.constexpr(ROWS)


@gluon.constexpr_function
def _mma_layout(token_tiles, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, 8 * token_tiles, 16])


@gluon.constexpr_function
def _masking(row, bit):
    """Two weights of 16 columns: bits `bit` and `bit` + 16 of the word of one of two rows."""
    return f"and.b32 $0, ${1 + row}, 0x{0x00010001 << bit:08X};"


@gluon.jit
def _masked(words, lower, BIT: gl.constexpr):
    """float16 `[groups, lanes, 2 (e), 2 (q), 2 (h)]` of a step, see `_weights`.

    It is told as an effect, for the compiler not to mask the signs of all products before the first, for which two
    planes have too few registers.
    """
    one: gl.constexpr = _masking(0, BIT)
    other: gl.constexpr = _masking(1, BIT)
    a0 = gl.inline_asm_elementwise(one, "=r,r,r", [words], dtype=gl.float16, is_pure=False, pack=2)
    a1 = gl.inline_asm_elementwise(other, "=r,r,r", [words], dtype=gl.float16, is_pure=False, pack=2)
    a2 = gl.inline_asm_elementwise(one, "=r,r,r", [lower], dtype=gl.float16, is_pure=False, pack=2)
    a3 = gl.inline_asm_elementwise(other, "=r,r,r", [lower], dtype=gl.float16, is_pure=False, pack=2)
    return gl.join(gl.join(a0, a2), gl.join(a1, a3))


@gluon.jit
def _weights(words, OPERAND: gl.constexpr):
    """Sign words `[groups, lanes, 2]` to the left operand `[16 * groups, 128]` of a product, 0 or 2^(b - 24).

    Lane `4 g + t` has word t of rows g and g + 8 (h). Step b takes bits b and b + 16 (e) of each, then b + 8 and b + 24
    (q).
    """
    GROUPS: gl.constexpr = words.shape[0]
    lower = words >> 8
    even = gl.join(
        gl.join(_masked(words, lower, 0), _masked(words, lower, 4)),
        gl.join(_masked(words, lower, 2), _masked(words, lower, 6)),
    )
    odd = gl.join(
        gl.join(_masked(words, lower, 1), _masked(words, lower, 5)),
        gl.join(_masked(words, lower, 3), _masked(words, lower, 7)),
    )
    # groups, g, t, e, q, h, and the step's bits of value 4, 2 and 1
    found = gl.reshape(gl.join(even, odd), [GROUPS, 8, 4, 2, 2, 2, 2, 2, 2])
    found = gl.reshape(gl.permute(found, (0, 5, 1, 6, 7, 8, 4, 2, 3)), [GROUPS * 16, _SLOTS])
    return gl.convert_layout(found, OPERAND, assert_trivial=True)


@gluon.jit
def _by_row(scale, TOKEN_TILES: gl.constexpr, MMA: gl.constexpr):
    """Row scales `[groups, lanes, 2]` to `[16 * groups, tokens]`, the same for all tokens."""
    GROUPS: gl.constexpr = scale.shape[0]
    found = gl.permute(gl.reshape(scale, [GROUPS, 8, 4, 2]), (0, 3, 1, 2))
    found = gl.join(found, found)
    if TOKEN_TILES == 2:
        found = gl.permute(gl.join(found, found), (0, 1, 2, 5, 3, 4))
    return gl.convert_layout(gl.reshape(found, [GROUPS * 16, 8 * TOKEN_TILES]), MMA, assert_trivial=True)


@gluon.jit
def _halves(words):
    """Of `[groups, lanes of four]`, which are 32 rows, the first 16 rows and the others: `[groups, lanes, 2]`."""
    return gl.split(gl.permute(gl.reshape(words, [words.shape[0], 32, 2, 2]), (0, 1, 3, 2)))


@gluon.jit
def no_sums(TOKEN_TILES: gl.constexpr, WARPS: gl.constexpr):
    """Zeros: float32 `[16 * WARPS, tokens]` of each warp's first 16 rows, and of the others."""
    zeros = gl.zeros([16 * WARPS, 8 * TOKEN_TILES], gl.float32, _mma_layout(TOKEN_TILES, WARPS))
    return zeros, zeros


@gluon.jit
def add_tile(
    sums, loaded, inputs, step,
    SCALE: gl.constexpr, INPUTS: gl.constexpr, TERMS: gl.constexpr, TOKEN_TILES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums with the terms of a tile.

    Nothing else is done before a product ends: to mask the next signs meanwhile took as long (28672 x 8192, one plane,
    16 tokens: 31.5 for 31.2 us), since both read and write registers as fast as these can.
    """
    MMA: gl.constexpr = sums[0].type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    words, scales = loaded
    for i in gl.static_range(INPUTS):
        factor = gl.expand_dims(inputs[i][1].index(2 * step).load(gl.SliceLayout(0, MMA)), 0)
        correction = gl.expand_dims(inputs[i][1].index(2 * step + 1).load(gl.SliceLayout(0, MMA)), 0)
        x = inputs[i][0].index(step).permute((1, 0))
        for j in gl.static_range(len(TERMS)):
            if TERMS[j][2] == i:
                scale0, scale1 = _halves(row_scale(scales[TERMS[j][1]], SCALE, TERMS[j][3], LAYOUT))
                scale0 = _by_row(scale0, TOKEN_TILES, MMA)
                scale1 = _by_row(scale1, TOKEN_TILES, MMA)
                if TERMS[j][0] == 0:
                    sums = (sums[0] - correction * scale0, sums[1] - correction * scale1)
                else:
                    zeros = gl.zeros([sums[0].shape[0], 8 * TOKEN_TILES], gl.float32, MMA)
                    words0, words1 = _halves(sign_word(words, TERMS[j][0]))
                    weights = _weights(words0, OPERAND)
                    product = warpgroup_mma(weights, x, zeros, use_acc=False, is_async=True)
                    product, weights = warpgroup_mma_wait(0, deps=(product, weights))
                    sum0 = sums[0] + (product * factor + correction) * scale0
                    weights = _weights(words1, OPERAND)
                    product = warpgroup_mma(weights, x, zeros, use_acc=False, is_async=True)
                    product, weights = warpgroup_mma_wait(0, deps=(product, weights))
                    sums = (sum0, sums[1] + (product * factor + correction) * scale1)
    return sums


@gluon.jit
def store(
    sums, out_ptr, bias_ptr, row, start, end, M, slice,
    BIAS: gl.constexpr, TOKEN_TILES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Stores the sums of the rows from `row` on, of results whose first is `start`, from where they are."""
    MMA: gl.constexpr = sums[0].type.layout
    number = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, MMA))
    rows = row + gl.expand_dims(number // 16 * _ROWS + number % 16, 1)
    token = gl.expand_dims(gl.arange(0, 8 * TOKEN_TILES, layout=gl.SliceLayout(0, MMA)), 0)
    for half in gl.static_range(2):
        at = rows + 16 * half
        found = sums[half]
        if BIAS:
            found += gl.load(bias_ptr + at, mask=(at < end) & (slice == 0), other=0.0).to(gl.float32)
        at_out = out_ptr + start * M + token * (end - start) + (at - start)
        gl.store(at_out, found.to(out_ptr.dtype.element_ty), mask=(at < end) & (token < M))
