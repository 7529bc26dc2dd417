"""The block Hadamard transform of an input where a kernel for few tokens prepares it: no launch of its own.

A warp transforms 128 columns of a token (`hadamard_fragments`); of blocks of 256 it transforms both halves and keeps
its own. Sums stay float32 until the kernel's own rounding, where a launch of its own rounds them to the dtype of x.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import hadamard_fragments as fragments
from .prepack import SLOTS

_SLOTS = gl.constexpr(SLOTS)
_TEXTS = gl.constexpr(
    tuple(fragments.butterflies(stages, ragged) for stages in range(fragments.STAGES + 1) for ragged in (False, True))
)
_CONSTRAINTS = gl.constexpr(tuple(map(fragments.butterflies_constraints, (False, True))))
_GATHER = gl.constexpr(fragments.gather())
_GATHER_CONSTRAINTS = gl.constexpr(fragments.GATHER_CONSTRAINTS)
_STAGES = gl.constexpr(fragments.STAGES)


@gluon.jit
def _load(row, permutation_ptr, sign_ptr, k, there, PERMUTED: gl.constexpr, RAGGED: gl.constexpr):
    """float32: `sign * x[permutation]` of columns k; 0 where there is none. Without a mask four are one load."""
    column = k
    if RAGGED:
        if PERMUTED:
            column = gl.load(permutation_ptr + k, mask=there, other=0).to(gl.int32)
        x = gl.load(row + column, mask=there, other=0)
        sign = gl.load(sign_ptr + k, mask=there, other=0)
    else:
        if PERMUTED:
            column = gl.load(permutation_ptr + k).to(gl.int32)
        x = gl.load(row + column)
        sign = gl.load(sign_ptr + k)
    return x.to(gl.float32) * sign.to(gl.float32)


@gluon.jit
def _butterflies(x, columns, STAGES: gl.constexpr, RAGGED: gl.constexpr):
    text: gl.constexpr = _TEXTS[2 * STAGES + RAGGED]
    constraints: gl.constexpr = _CONSTRAINTS[RAGGED]
    if RAGGED:
        found = gl.inline_asm_elementwise(text, constraints, [x, columns], dtype=gl.float32, is_pure=False, pack=4)
    else:
        found = gl.inline_asm_elementwise(text, constraints, [x], dtype=gl.float32, is_pure=False, pack=4)
    return found


@gluon.jit
def transform_tile(
    row,
    permutation_ptr,
    sign_ptr,
    index,
    slot,
    tile,
    K,
    LOG: gl.constexpr,
    PERMUTED: gl.constexpr,
    RAGGED: gl.constexpr,
    TILE: gl.constexpr,
):
    """float32: what the slots of a tile hold of `Hadamard(sign * x[permutation])`, anything in those of no column.

    Args:
        row: the address of a token's x, or `[tokens, 1]` of them.
        permutation_ptr: integers `[K]`, if PERMUTED.
        sign_ptr: int8 `[K]`.
        index: the column of each slot, if RAGGED; like slot.
        slot: 0 to 127, four neighbours a lane; `[128]` or `[1, 128]`.
        tile: which.
        K: columns.
        LOG: of a block's columns.
        PERMUTED: see above.
        RAGGED: whether slots are not columns in their order; else 128 divides K.
        TILE: columns of a tile, 64 or 128.
    """
    STAGES: gl.constexpr = LOG if LOG < _STAGES else _STAGES
    chunk = tile * TILE // _SLOTS
    left = slot * 0 + gl.minimum(K - chunk * _SLOTS, _SLOTS)
    there = slot < left
    x = _load(row, permutation_ptr, sign_ptr, chunk * _SLOTS + slot, there, PERMUTED, RAGGED)
    y = x
    if LOG > _STAGES:  # before the first wait for memory
        whole = K - (chunk - chunk % 2) * _SLOTS >= 2 * _SLOTS
        other = gl.where(whole, chunk ^ 1, chunk)
        y = _load(row, permutation_ptr, sign_ptr, other * _SLOTS + slot, there, PERMUTED, RAGGED)
    x = _butterflies(x, left, STAGES, RAGGED)
    log = slot * 0 + STAGES
    if RAGGED:
        # the highest bit of (slot xor left), as the exponent of its float32
        log = gl.minimum(((slot ^ left).to(gl.float32).to(gl.int32, bitcast=True) >> 23) - 127, STAGES)
    if LOG > _STAGES:
        y = _butterflies(y, left, STAGES, False)
        # the first half of the block is the sum of both, the second the first less the second
        own = gl.where(whole, 1 - 2 * (chunk % 2), 1).to(gl.float32)
        x = x * own + gl.where(whole, y, 0.0)
        log = gl.where(whole, LOG, log)
    # 2^(-log / 2)
    unit = ((127 - (log >> 1)) << 23).to(gl.float32, bitcast=True)
    x = x * (unit * gl.where((log & 1) == 1, 0.7071067811865476, 1.0))
    if RAGGED:
        source = (index - chunk * _SLOTS) & (_SLOTS - 1)
        x = gl.inline_asm_elementwise(
            _GATHER, _GATHER_CONSTRAINTS, [x, source], dtype=gl.float32, is_pure=False, pack=4
        )  # fmt: skip
    return x
