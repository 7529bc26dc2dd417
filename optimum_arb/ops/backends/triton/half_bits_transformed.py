"""`half_bits_kernels._prepare` of inputs that go through a block Hadamard transform first, without a launch for that.

A warp holds the 128 columns of one token, as the butterflies of `hadamard_inputs` need them; what it writes is the same
form.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hadamard_inputs import transform_tile
from .half_bits_inputs import CHUNK, WARPGROUP_CHUNK
from .one_bit_kernels import _LAUNCH, _WAIT, _after
from .prepack import SLOTS

WARPS = 8  # one a token

_CHUNK = gl.constexpr(CHUNK)
_WARPGROUP_CHUNK = gl.constexpr(WARPGROUP_CHUNK)
_SLOTS = gl.constexpr(SLOTS)
_WARPS = gl.constexpr(WARPS)


@gluon.jit(do_not_specialize=["T", "x_stride", "M", "K"])
def _prepare_transformed(
    x_ptr,
    permutation_ptr,
    sign_ptr,
    scale_ptr,
    index_ptr,
    out_ptr,
    T,
    x_stride,
    M,
    K,
    INPUTS: gl.constexpr,
    PARTS: gl.constexpr,
    INDEXED: gl.constexpr,
    LOG: gl.constexpr,
    PERMUTED: gl.constexpr,
    TILE: gl.constexpr,
    OVERLAP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):
    """x [M, K] to words [PARTS * INPUTS, T, ceil(M / 8), CHUNK]. Grid (T, ceil(M / 8), PARTS * INPUTS).

    OVERLAP, WARPGROUPS: see `half_bits_kernels._prepare`.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [_WARPS, 1], [1, 0])
    slot = gl.arange(0, _SLOTS, layout=gl.SliceLayout(0, layout))
    if OVERLAP:
        slot = _after(slot, _LAUNCH)
    slot = gl.expand_dims(slot, 0)
    tile = gl.program_id(0)
    source = gl.program_id(2)
    g = gl.arange(0, _WARPS, layout=gl.SliceLayout(1, layout))
    token = gl.program_id(1) * _WARPS + g
    at = tile * _SLOTS + slot
    column = at
    if INDEXED:
        column = gl.load(index_ptr + (source // INPUTS) * (T * _SLOTS) + at)
    scale = gl.load(scale_ptr + source * (T * _SLOTS) + at)
    if OVERLAP:
        late = _after(gl.arange(0, _SLOTS, layout=gl.SliceLayout(0, layout)), _WAIT)
        late = gl.expand_dims(late, 0)
        column = column + (late - slot) if INDEXED else tile * _SLOTS + late
        slot = late
    # past the last token the last one again, whose numbers are then taken for zeros
    row = x_ptr + gl.expand_dims(gl.minimum(token, M - 1).to(gl.int64) * x_stride, 1)
    x = transform_tile(row, permutation_ptr, sign_ptr, column, slot, tile, K, LOG, PERMUTED, INDEXED, TILE)
    x = gl.where(gl.expand_dims(token < M, 1) & (scale != 0), x * scale, 0.0)
    # magnitudes are ordered like their bits, and NaN is above infinity
    largest = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    exponent = gl.maximum(largest >> 23, 1)
    inverse = gl.expand_dims(((254 - exponent) << 23).to(gl.float32, bitcast=True), 1)
    bit = slot // 16
    step = ((127 + 14 - bit) << 23).to(gl.float32, bitcast=True)
    half = (x * inverse * step).to(gl.float16)
    weight = ((127 + bit - 25) << 23).to(gl.float32, bitcast=True)
    correction = -gl.sum(half.to(gl.float32) * weight, 1)
    back = (exponent << 23).to(gl.float32, bitcast=True) * 2048.0
    back = gl.where(exponent >= 254, float("nan"), back)  # infinity, NaN, and what overflows with the next addition
    # of a lane's four columns the operand holds + 0 and + 2 in one register, + 1 and + 3 in the next
    half = gl.permute(gl.reshape(half, [_WARPS, _SLOTS // 4, 2, 2]), (0, 1, 3, 2))
    half = gl.convert_layout(gl.reshape(half, [_WARPS, _SLOTS]), layout)
    chunks = gl.num_programs(1)
    if WARPGROUPS:
        chunk = out_ptr + (source * T + tile) * (chunks * _WARPGROUP_CHUNK)
        piece = (bit % 4 * 2 + slot // 2 % 2) ^ gl.expand_dims(g, 1)
        place = bit // 4 * (chunks * 512) + gl.program_id(1) * 512 + gl.expand_dims(g * 64, 1)
        place += piece * 8 + slot // 4 % 4 * 2 + slot % 2
        place = gl.max_contiguous(gl.multiple_of(place, [1, 2]), [1, 2])
        gl.store(chunk.to(gl.pointer_type(gl.float16), bitcast=True) + place, half)
        factors = chunk.to(gl.pointer_type(gl.float32), bitcast=True) + (chunks * 512 + gl.program_id(1) * 8 + g)
        gl.store(factors, back)
        gl.store(factors + chunks * 8, correction * back)
    else:
        place = slot // 32 * 256 + slot // 4 % 4 * 8 + bit % 2 * 4 + slot % 4
        place = gl.max_contiguous(gl.multiple_of(place, [1, 4]), [1, 4]) + gl.expand_dims(g * 32, 1)
        chunk = out_ptr + ((source * T + tile) * chunks + gl.program_id(1)) * _CHUNK
        gl.store(chunk.to(gl.pointer_type(gl.float16), bitcast=True) + place, half)
        factors = chunk.to(gl.pointer_type(gl.float32), bitcast=True) + (512 + (g >> 1) * 4 + (g & 1))
        for twice in gl.static_range(2):
            gl.store(factors + 2 * twice, correction)
            gl.store(factors + 2 * twice + 16, back)
