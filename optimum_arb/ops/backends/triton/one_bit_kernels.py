"""The two kernels for one to four tokens: fixed-point inputs as bit planes, and sign words times them.

`_prepare` scales the inputs by the column scales, rounds each tile of 128 to 16-bit fixed point (2.8e-5 of the result,
less than rounding them to float16) and writes their bit planes; `_decode` reads every sign word once.
"""

# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import fragments
from .hadamard_inputs import transform_tile
from .prepack import ROWS, SLOTS
from .prepacked_tiles import first_scale, load_tile, part_of, row_scale, scale_values, sign_word

_PREPARE = gl.constexpr(fragments.prepare())
_PREPARE_CONSTRAINTS = gl.constexpr(fragments.PREPARE_CONSTRAINTS)
_MULTIPLY = gl.constexpr(fragments.multiply())
_MULTIPLY_CONSTRAINTS = gl.constexpr(fragments.MULTIPLY_CONSTRAINTS)
_ADD_SUM = gl.constexpr(fragments.add_sum())
_ADD_SUM_CONSTRAINTS = gl.constexpr(fragments.ADD_SUM_CONSTRAINTS)
_SLOTS = gl.constexpr(SLOTS)
_ROWS = gl.constexpr(ROWS)
# the operand is passed through so that what is computed from it stays behind the instruction
_WAIT = gl.constexpr("{ griddepcontrol.wait; mov.b32 $0, $1; }")
_LAUNCH = gl.constexpr("{ griddepcontrol.launch_dependents; mov.b32 $0, $1; }")


@gluon.jit
def _after(slot, INSTRUCTION: gl.constexpr):
    """The slots 0 to 127, four neighbours a lane; what is computed from them stays behind the instruction."""
    slot = gl.inline_asm_elementwise(INSTRUCTION, "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1)
    return gl.max_contiguous(gl.multiple_of(slot, 128), 128)


@gluon.jit(do_not_specialize=["T", "x_stride", "M", "K"])
def _prepare(
    x_ptr,
    permutation_ptr,
    sign_ptr,
    scale_ptr,
    index_ptr,
    expert_ptr,
    out_ptr,
    T,
    x_stride,
    M,
    K,
    INPUTS: gl.constexpr,
    PARTS: gl.constexpr,
    EXPERTS: gl.constexpr,
    INDEXED: gl.constexpr,
    LOG: gl.constexpr,
    PERMUTED: gl.constexpr,
    TILE: gl.constexpr,
    EARLY: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """x [M, K] to int32 [PARTS, INPUTS, M, T, 128]. Grid (T, M, PARTS * INPUTS), one warp.

    With LOG x goes through a Hadamard transform of blocks of 2^LOG columns first, see `hadamard_inputs`. EARLY: this is
    launched while what writes x still runs. OVERLAP: `_decode` may begin; it reads nothing but weights until this has
    ended, but for the experts, which may be written as late as x.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    slot = gl.arange(0, _SLOTS, layout=layout)
    if EARLY and EXPERTS:
        slot = _after(slot, _WAIT)
    if OVERLAP:
        slot = _after(slot, _LAUNCH)
    tile = gl.program_id(0)
    token = gl.program_id(1)
    source = gl.program_id(2)
    at = tile * _SLOTS + slot
    weight = 0
    if EXPERTS:
        weight = gl.minimum(gl.load(expert_ptr + token), EXPERTS - 1).to(gl.int64)
    if INDEXED:
        column = gl.load(index_ptr + (weight * PARTS + source // INPUTS) * (T * _SLOTS) + at)
    else:
        column = at
    scale = gl.load(scale_ptr + (weight * (PARTS * INPUTS) + source) * (T * _SLOTS) + at)
    if EARLY and not EXPERTS:
        late = _after(slot, _WAIT)
        column = column + (late - slot) if INDEXED else tile * _SLOTS + late
        slot = late
    row = x_ptr + token.to(gl.int64) * x_stride
    if LOG:
        x = transform_tile(row, permutation_ptr, sign_ptr, column, slot, tile, K, LOG, PERMUTED, INDEXED, TILE)
    else:
        x = gl.load(row + column).to(gl.float32)
    x = gl.where(scale != 0, x * scale, 0.0)
    words = gl.inline_asm_elementwise(_PREPARE, _PREPARE_CONSTRAINTS, [x], dtype=gl.int32, is_pure=False, pack=4)
    gl.store(out_ptr + ((source * M + token) * T) * _SLOTS + at, words)


@gluon.jit
def _load_inputs(at, tile, T, distance, INPUTS: gl.constexpr):
    """The operands of each input of a warp's tile, `distance` apart."""
    there = gl.expand_dims(tile < T, 0)
    found = ()
    for i in gl.static_range(INPUTS):
        found = found + (gl.load(at + i * distance, mask=there, other=0),)
    return found


@gluon.jit
def _add_tile(sums, loaded, inputs, relative, SCALE: gl.constexpr, TERMS: gl.constexpr, LAYOUT: gl.constexpr):
    """The sums with the terms of a tile, whose words and row scales (of dtype SCALE) and inputs were loaded."""
    words, scales = loaded
    for i in gl.static_range(len(inputs)):
        x = gl.expand_dims(inputs[i], 1)
        for j in gl.static_range(len(TERMS)):
            if TERMS[j][2] == i:
                scale = gl.expand_dims(row_scale(scales[TERMS[j][1]], SCALE, TERMS[j][3], LAYOUT), 0)
                if TERMS[j][0] == 0:
                    sums = gl.inline_asm_elementwise(
                        _ADD_SUM, _ADD_SUM_CONSTRAINTS, [x, scale, sums], dtype=gl.float32, is_pure=True, pack=4
                    )
                else:
                    word = gl.expand_dims(sign_word(words, TERMS[j][0]), 0)
                    sums = gl.inline_asm_elementwise(
                        _MULTIPLY,
                        _MULTIPLY_CONSTRAINTS,
                        [word, x, scale, sums, relative],
                        dtype=gl.float32,
                        is_pure=True,
                        pack=4,
                    )
    return sums


@gluon.jit(do_not_specialize=["T", "G", "M", "end0", "end1", "end2", "group1", "group2", "out_rows"])
def _decode(
    input_ptr,
    words_ptr,
    scale_ptr,
    expert_ptr,
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
    out_rows,
    PLANES: gl.constexpr,
    ROW_SCALES: gl.constexpr,
    INPUTS: gl.constexpr,
    TERMS: gl.constexpr,
    TILES_PER_BLOCK: gl.constexpr,
    BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    INPUTS_AHEAD: gl.constexpr,
    ONE_ROUND: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One program: GROUPS * 32 rows of all tiles, every warp the tiles w, w + WARPS, ...

    Parts (weights of one input, joined) begin at row groups group1 and group2; end0, end1 and end2 are the columns of
    out at which their results end. Of a warp's tiles AHEAD are loaded before they are multiplied, all of them with
    ONE_ROUND, and INPUTS_AHEAD (AHEAD or 1) of the inputs' tiles.
    """
    layout: gl.constexpr = gl.BlockedLayout([TOKENS, GROUPS, 4], [1, 1, 32], [1, 1, WARPS], [2, 1, 0])
    weight_layout: gl.constexpr = gl.SliceLayout(0, layout)  # [GROUPS, lanes]
    input_layout: gl.constexpr = gl.SliceLayout(1, layout)  # [TOKENS, lanes]
    LANES: gl.constexpr = WARPS * _SLOTS
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, weight_layout))
    warp = lane // _SLOTS
    slot = lane % _SLOTS
    t = lane // 4 % 4
    group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, weight_layout))
    input_lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, input_layout))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, input_layout))

    first = gl.program_id(0) * GROUPS
    part, first_group, start, end = part_of(first, group1, group2, end0, end1, end2, PARTS)
    row_group = gl.expand_dims(gl.minimum(first + group, G - 1), 1)
    blocks = gl.cdiv(T, TILES_PER_BLOCK)
    expert = 0
    if EXPERTS:
        expert = gl.load(expert_ptr + gl.program_id(1))
        weight = gl.minimum(expert, EXPERTS - 1).to(gl.int64)
        words_ptr += weight * (G * T * (PLANES * _SLOTS))
        scale_ptr += weight * (G * blocks * (ROW_SCALES * _ROWS))
    words_at = words_ptr + row_group * (T * (PLANES * _SLOTS)) + gl.expand_dims(warp * (PLANES * _SLOTS) + slot, 0)
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    VALUES: gl.constexpr = scale_values(SCALE)
    scale_layout: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([GROUPS, VALUES], [1, 32], [1, WARPS], [1, 0]))
    scale_lane = gl.arange(0, WARPS * (32 * VALUES), layout=scale_layout)
    scale_warp = scale_lane // (32 * VALUES)
    scale_group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, scale_layout.parent))
    scale_group = gl.expand_dims(gl.minimum(first + scale_group, G - 1), 1)
    scale_at = first_scale(scale_ptr, scale_group, scale_lane, blocks, ROW_SCALES)
    relative = gl.expand_dims(gl.expand_dims(gl.where(t == 3, -2, 2), 0), 0)
    sums = gl.full([TOKENS, GROUPS, LANES], 0.0, gl.float32, layout=layout)

    ahead = ()
    for d in gl.static_range(AHEAD):
        ahead = ahead + (
            load_tile(
                words_at + d * (WARPS * PLANES * _SLOTS), scale_at, warp + d * WARPS, scale_warp + d * WARPS, T,
                TILES_PER_BLOCK, PLANES, ROW_SCALES, VALUES,
            ),
        )  # fmt: skip
    input_slot = input_lane
    if OVERLAP:
        zero = gl.inline_asm_elementwise(_WAIT, "=r,r", [input_lane * 0], dtype=gl.int32, is_pure=False, pack=1)
        input_slot = input_lane + gl.max_constancy(gl.multiple_of(zero, [128]), [128])
    input_at = input_ptr + part * (INPUTS * M * T * _SLOTS)
    if EXPERTS:
        token += gl.program_id(1)
    input_at += gl.expand_dims(gl.minimum(token, M - 1) * (T * _SLOTS), 1) + gl.expand_dims(input_slot, 0)

    input_warp = input_lane // _SLOTS
    distance = M * T * _SLOTS
    inputs_ahead = ()
    for d in gl.static_range(INPUTS_AHEAD):
        inputs_ahead = inputs_ahead + (
            _load_inputs(input_at + d * (WARPS * _SLOTS), input_warp + d * WARPS, T, distance, INPUTS),
        )
    if ONE_ROUND:
        for d in gl.static_range(AHEAD):
            sums = _add_tile(sums, ahead[d], inputs_ahead[0], relative, SCALE, TERMS, weight_layout)
            inputs_ahead = inputs_ahead[1:]
            if d + INPUTS_AHEAD < AHEAD:
                following = (d + INPUTS_AHEAD) * WARPS
                inputs_ahead = inputs_ahead + (
                    _load_inputs(input_at + following * _SLOTS, following + input_warp, T, distance, INPUTS),
                )
    else:
        # a round is as many steps as tiles are ahead, so that each of these keeps its registers: to move one is to wait
        for first_step in range(0, gl.cdiv(T, WARPS), AHEAD):
            for d in gl.static_range(AHEAD):
                sums = _add_tile(sums, ahead[0], inputs_ahead[0], relative, SCALE, TERMS, weight_layout)
                following = (first_step + d + AHEAD) * WARPS
                ahead = ahead[1:] + (
                    load_tile(
                        words_at + following * (PLANES * _SLOTS), scale_at, following + warp, following + scale_warp, T,
                        TILES_PER_BLOCK, PLANES, ROW_SCALES, VALUES,
                    ),
                )  # fmt: skip
                following = (first_step + d + INPUTS_AHEAD) * WARPS
                inputs_ahead = inputs_ahead[1:] + (
                    _load_inputs(input_at + following * _SLOTS, following + input_warp, T, distance, INPUTS),
                )
    sums = sums * gl.expand_dims(gl.expand_dims((1 << (2 * t)).to(gl.float32), 0), 0)
    sums = gl.reshape(sums, [TOKENS, GROUPS, WARPS, 8, 4, 4])
    sums = gl.permute(gl.sum(sums, 4), (0, 1, 4, 3, 2))  # [TOKENS, GROUPS, row / 8, row % 8, WARPS]
    # a row's sums of all warps come to one thread: one exchange through shared memory
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 1, WARPS], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    out_layout: gl.constexpr = gl.SliceLayout(2, rows_layout)
    out = gl.sum(gl.convert_layout(gl.reshape(sums, [TOKENS, GROUPS * _ROWS, WARPS]), rows_layout), 2)
    row = (first - first_group) * _ROWS + start + gl.arange(0, GROUPS * _ROWS, layout=gl.SliceLayout(0, out_layout))
    out_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, out_layout))
    if BIAS:
        out += gl.expand_dims(gl.load(bias_ptr + row, mask=row < end, other=0.0).to(gl.float32), 0)
    if EXPERTS:
        out = gl.where(expert < EXPERTS, out, 0.0)
        out_at = out_ptr + gl.program_id(1) * out_rows + gl.expand_dims(out_token * 0, 1) + gl.expand_dims(row, 0)
    else:
        out_at = out_ptr + start * M + gl.expand_dims(out_token * (end - start), 1) + gl.expand_dims(row - start, 0)
    there = gl.expand_dims(row < end, 0) & gl.expand_dims(out_token < M, 1)
    gl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=there)
