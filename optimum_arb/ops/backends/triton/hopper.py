"""The fused product on sm_90: packed tiles become the register operand of asynchronous warpgroup products.

Every warpgroup owns some rows of the weight and BLOCK_M tokens and walks the packing tiles, 128 columns each. The
tensor copy engine brings the packed bytes of TILES tiles and the tokens' columns into a ring of STAGES slots of shared
memory. Signs are turned into weights two at a time, with one shift, one three-input logic operation and one
multiply-add a plane; W is the left operand, so that the decoded weights never leave their registers.

A warpgroup waits for its product before it decodes on: ptxas keeps the registers of a left operand only until the
product is issued, and a decode beside it would change them under its hands. What keeps the tensor cores busy is
another warpgroup's product: several small programs on a multiprocessor (`_shared_kernel`), or one large program
(`_split_kernel`) whose warpgroups share the tokens' columns, meet nowhere, and have them brought by a warp of its own.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..packed import PackedWeight
from .available import triton_version
from .columns import column_scales
from .launch import Launch, Launcher, cdiv, tensor_class

if triton_version() < (3, 6):  # layouts of shared memory took other arguments, of which this would fail on a GPU
    raise ImportError("The fused product on sm_90 needs Triton 3.6.")

GROUP = 8  # tiles of rows whose programs run side by side, see `_place`
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
def _load_scales(pointer, tile, tiles_per_block, last, PLANES: gl.constexpr, SCALES: gl.constexpr, DTYPE: gl.constexpr):
    """The row scales of this tile's block, and its mean (the first scale where there is none)."""
    at = pointer + gl.minimum(tile // tiles_per_block, last) * SCALES
    r0 = gl.load(at).to(DTYPE)
    r1 = r0
    r2 = r0
    mean = r0
    if PLANES > 1:
        r1 = gl.load(at + 1).to(DTYPE)
    if PLANES > 2:
        r2 = gl.load(at + 2).to(DTYPE)
    if SCALES > PLANES:
        mean = gl.load(at + PLANES).to(DTYPE)
    return r0, r1, r2, mean


@gluon.jit
def _fetch(
    x_desc, w_desc, c_desc, x_ring, bits, columns, ready, tile, slot, m, n, K, pred,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Asks for the TILES tiles from number `tile` on in this slot; past the last column there come zeros."""
    bar = ready.index(slot)
    COPIES: gl.constexpr = TILES * PLANES if PLANES == 3 else 1
    size: gl.constexpr = (
        x_desc.block_type.nbytes
        + COPIES * w_desc.block_type.nbytes
        + COLUMNS * TILES * PLANES * c_desc.block_type.nbytes
    )
    mbarrier.expect(bar, size, pred=pred)
    for copy in gl.static_range(COPIES):
        tma.async_copy_global_to_shared(
            w_desc, [n, (tile * PLANES + copy) * BYTES], bar, bits.index(slot * COPIES + copy), pred=pred
        )
    if COLUMNS:
        for t in gl.static_range(TILES):
            for p in gl.static_range(PLANES):
                tma.async_copy_global_to_shared(
                    c_desc, [p * K + (tile + t) * TILE], bar, columns.index((slot * TILES + t) * PLANES + p), pred=pred
                )
    tma.async_copy_global_to_shared(x_desc, [m, tile * TILE], bar, x_ring.index(slot), pred=pred)


@gluon.jit
def _stage_scales(
    pointer, tile, tiles_per_block, last,
    PLANES: gl.constexpr, SCALES: gl.constexpr, DTYPE: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The row scales of the TILES tiles from number `tile` on (TILES is 1 or 2)."""
    first = _load_scales(pointer, tile, tiles_per_block, last, PLANES, SCALES, DTYPE)
    second = first
    if TILES == 2:
        second = _load_scales(pointer, tile + 1, tiles_per_block, last, PLANES, SCALES, DTYPE)
    return first, second


@gluon.jit
def _product(
    sums, x_ring, bits, columns, slot, first, second,
    PART: gl.constexpr, PLANES: gl.constexpr, COLUMNS: gl.constexpr, MEAN: gl.constexpr, DTYPE: gl.constexpr,
    TILES: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """sums plus the product of what is in this slot, done when this returns."""
    x = x_ring.index(slot)
    w = _decode(
        bits, columns, slot, first, 0, PART, PLANES, COLUMNS, MEAN, DTYPE, TILES, LAYOUT, OPERAND
    )  # fmt: skip
    if TILES == 1:
        sums = warpgroup_mma(w, x.permute((1, 0)), sums, is_async=True)
        sums, w = warpgroup_mma_wait(0, deps=(sums, w))
    else:
        w2 = _decode(
            bits, columns, slot, second, 1, PART, PLANES, COLUMNS, MEAN, DTYPE, TILES, LAYOUT, OPERAND
        )  # fmt: skip
        sums = warpgroup_mma(w, x.slice(0, TILE, dim=1).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma(w2, x.slice(TILE, TILE, dim=1).permute((1, 0)), sums, is_async=True)
        sums, w, w2 = warpgroup_mma_wait(0, deps=(sums, w, w2))
    return sums


@gluon.jit
def _store(sums, out, bias, split, m, n, M, N, HAS_BIAS: gl.constexpr):
    """out[m, n] (or float32 [split, m, n]) of one tile, through a layout whose threads hold neighbouring n."""
    WARPS: gl.constexpr = gl.num_warps()
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    result = sums.to(out.dtype.element_ty)
    result = gl.convert_layout(result, STORE)
    to_n = n + gl.arange(0, sums.shape[0], gl.SliceLayout(1, STORE))
    to_m = m + gl.arange(0, sums.shape[1], gl.SliceLayout(0, STORE))
    if HAS_BIAS:
        added = gl.load(bias + gl.minimum(to_n, N - 1)).to(gl.float32)
        result = (result.to(gl.float32) + gl.expand_dims(added, 1)).to(out.dtype.element_ty)
    at = out + split.to(gl.int64) * M * N + gl.expand_dims(to_m.to(gl.int64) * N, 0) + gl.expand_dims(to_n, 1)
    gl.store(at, result, mask=gl.expand_dims(to_n < N, 1) & gl.expand_dims(to_m < M, 0))


@gluon.jit
def _place(M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """The first token and row of this program: neighbours share rows or tokens, GROUP tiles of rows at a time."""
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    program = gl.program_id(0)
    group = program // (GROUP * tiles_m)
    height = gl.minimum(tiles_n - group * GROUP, GROUP)
    inside = program - group * GROUP * tiles_m
    return (inside // height) * BLOCK_M, (group * GROUP + inside % height) * BLOCK_N


@gluon.jit
def _row_scales(row_scale, row_stride, n, N, LAYOUT: gl.constexpr):
    """Where the scales of this warpgroup's rows begin."""
    rows = gl.minimum(n + gl.arange(0, LAYOUT.shape[0], gl.SliceLayout(1, LAYOUT)), N - 1)
    return row_scale + rows.to(gl.int64) * row_stride


@gluon.jit(do_not_specialize=["M", "row_stride", "share"])
def _shared_kernel(
    x_desc, w_desc, c_desc, out, bias, row_scale, M, N, K, row_stride, tiles_per_block, share,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup (or two in step) a program, which is small enough to share its multiprocessor with others."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_desc.dtype
    MEAN: gl.constexpr = SCALES > PLANES
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LAYOUT: gl.constexpr = _row_layout(BLOCK_N, WARPS)
    m, n = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    split = gl.program_id(1)
    tiles = K // TILE
    start = split * share
    steps = gl.cdiv(gl.minimum(share, tiles - start), TILES)

    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, TILES * TILE], x_desc.layout)
    COPIES: gl.constexpr = TILES * PLANES if PLANES == 3 else 1
    bits = gl.allocate_shared_memory(gl.uint8, [STAGES * COPIES, BLOCK_N, w_desc.block_shape[1]], w_desc.layout)
    columns = bits
    if COLUMNS:
        columns = gl.allocate_shared_memory(DTYPE, [STAGES * TILES * PLANES, TILE], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    if PDL:  # x is what the launch before this one writes
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    for stage in gl.static_range(STAGES):
        _fetch(
            x_desc, w_desc, c_desc, x_ring, bits, columns, ready, start + stage * TILES, stage, m, n, K,
            stage < steps, PLANES, COLUMNS, TILES,
        )  # fmt: skip

    scales = _row_scales(row_scale, row_stride, n, N, LAYOUT)
    last = (tiles - 1) // tiles_per_block
    first, second = _stage_scales(scales, start, tiles_per_block, last, PLANES, SCALES, DTYPE, TILES)
    sums = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    for step in range(steps):
        following = start + (step + 1) * TILES
        next_first, next_second = _stage_scales(scales, following, tiles_per_block, last, PLANES, SCALES, DTYPE, TILES)
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        sums = _product(
            sums, x_ring, bits, columns, slot, first, second,
            0, PLANES, COLUMNS, MEAN, DTYPE, TILES, LAYOUT, OPERAND,
        )  # fmt: skip
        # every warp is past the product of this step: its slot can be filled again
        gl.thread_barrier()
        ahead = step + STAGES
        _fetch(
            x_desc, w_desc, c_desc, x_ring, bits, columns, ready, start + ahead * TILES, slot, m, n, K,
            ahead < steps, PLANES, COLUMNS, TILES,
        )  # fmt: skip
        first = next_first
        second = next_second
    # what follows may use the ring's memory again
    gl.thread_barrier()
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    _store(sums, out, bias, split, m, n, M, N, HAS_BIAS)


@gluon.jit
def _copying_warp(
    x_desc, w_desc, c_desc, x_ring, bits, columns, ready, empty, start, steps, m, n, K,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    for step in range(steps):
        slot = step % STAGES
        # a barrier that nothing has passed yet counts as past the phase of parity 1
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        _fetch(
            x_desc, w_desc, c_desc, x_ring, bits, columns, ready, start + step * TILES, slot, m, n, K,
            True, PLANES, COLUMNS, TILES,
        )  # fmt: skip


@gluon.jit
def _warpgroup(
    x_ring, bits, columns, ready, empty, out, bias, row_scale, M, N, K, row_stride, tiles_per_block,
    split, start, steps, m, n,
    PART: gl.constexpr, PLANES: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The PART-th ROWS rows of a program."""
    DTYPE: gl.constexpr = x_ring.dtype
    MEAN: gl.constexpr = SCALES > PLANES
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LAYOUT: gl.constexpr = _row_layout(ROWS, 4)
    scales = _row_scales(row_scale, row_stride, n + PART * ROWS, N, LAYOUT)
    last = (K // TILE - 1) // tiles_per_block
    first, second = _stage_scales(scales, start, tiles_per_block, last, PLANES, SCALES, DTYPE, TILES)
    sums = gl.zeros([ROWS, BLOCK_M], gl.float32, MMA)
    for step in range(steps):
        following = start + (step + 1) * TILES
        next_first, next_second = _stage_scales(scales, following, tiles_per_block, last, PLANES, SCALES, DTYPE, TILES)
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        sums = _product(
            sums, x_ring, bits, columns, slot, first, second,
            PART, PLANES, COLUMNS, MEAN, DTYPE, TILES, LAYOUT, OPERAND,
        )  # fmt: skip
        # all four warps have read the slot
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        first = next_first
        second = next_second
    _store(sums, out, bias, split, m, n + PART * ROWS, M, N, HAS_BIAS)


@gluon.jit(do_not_specialize=["M", "row_stride", "share"])
def _split_kernel(
    x_desc, w_desc, c_desc, out, bias, row_scale, M, N, K, row_stride, tiles_per_block, share,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Two warpgroups, each with half of the rows and a rhythm of its own, and a warp that asks for tiles."""
    DTYPE: gl.constexpr = x_desc.dtype
    ROWS: gl.constexpr = BLOCK_N // 2
    m, n = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    split = gl.program_id(1)
    start = split * share
    steps = gl.cdiv(gl.minimum(share, K // TILE - start), TILES)
    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, TILES * TILE], x_desc.layout)
    COPIES: gl.constexpr = TILES * PLANES if PLANES == 3 else 1
    bits = gl.allocate_shared_memory(gl.uint8, [STAGES * COPIES, BLOCK_N, w_desc.block_shape[1]], w_desc.layout)
    columns = bits
    if COLUMNS:
        columns = gl.allocate_shared_memory(DTYPE, [STAGES * TILES * PLANES, TILE], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    if PDL:  # x is what the launch before this one writes
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    gl.warp_specialize(
        [
            (
                _warpgroup,
                (
                    x_ring, bits, columns, ready, empty, out, bias, row_scale, M, N, K, row_stride, tiles_per_block,
                    split, start, steps, m, n, 0, PLANES, COLUMNS, SCALES, HAS_BIAS, BLOCK_M, ROWS, STAGES, TILES,
                ),
            ),
            (
                _warpgroup,
                (
                    x_ring, bits, columns, ready, empty, out, bias, row_scale, M, N, K, row_stride, tiles_per_block,
                    split, start, steps, m, n, 1, PLANES, COLUMNS, SCALES, HAS_BIAS, BLOCK_M, ROWS, STAGES, TILES,
                ),
            ),
            (
                _copying_warp,
                (
                    x_desc, w_desc, c_desc, x_ring, bits, columns, ready, empty, start, steps, m, n, K,
                    PLANES, COLUMNS, STAGES, TILES,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip


class Multiply:
    """Fills a result `[M, N]`, or float32 `[split_k, M, N]` with sums that are still to be added.

    Args:
        packed: a weight of `planes-*` layout in tiles of 128 columns, all whole; 16-byte aligned.
        tokens: M.
        stride: from row to row of x.
        x_dtype: float16 or bfloat16.
        out_dtype: of the result.
        bias: `tensor_class` of the bias, only where split_k is 1; None where there is none.
        device: of all tensors.
        block_m: tokens of a program, at most 256.
        block_n: weight rows of a program.
        warps: 4, or 8: two warpgroups and a copying warp.
        stages: slots of the ring.
        tiles: packing tiles of a slot, 1 or 2.
        split_k: programs along K.
        scaled: x is multiplied by the (single) column scale already.
        overlapped: start while the launch before this one, which may write x, is still ending.
    """

    def __init__(
        self,
        packed: PackedWeight,
        tokens: int,
        stride: int,
        x_dtype: torch.dtype,
        out_dtype: torch.dtype,
        bias: tuple[torch.dtype, bool] | None,
        device: torch.device,
        *,
        block_m: int,
        block_n: int,
        warps: int,
        stages: int,
        tiles: int,
        split_k: int,
        scaled: bool,
        overlapped: bool,
    ):
        layout = packed.layout
        rows, columns = packed.out_features, packed.in_features
        with_columns = bool(layout.col_scales) and not scaled
        self.x_box, w_box, self.c_box = _boxes(x_dtype, layout.planes, block_m, block_n, tiles)
        self.x_shape, self.x_strides = (tokens, columns), (stride, 1)
        self.w_desc = _descriptor(packed.weight, *w_box)
        self.col_scale = packed.col_scale if with_columns else None
        self.dtype = x_dtype
        self.row_scale = packed.row_scale
        tiles_per_block = columns // 128 if packed.block_size == -1 else packed.block_size // 128
        constants = (
            layout.planes,
            with_columns,
            layout.row_scales,
            bias is not None,
            overlapped,
            block_m,
            block_n,
            stages,
            tiles,
            GROUP,
        )
        share = cdiv(cdiv(columns // 128, tiles), split_k) * tiles
        self.rest = (tokens, rows, columns, self.row_scale.shape[1], tiles_per_block, share, *constants)
        self.launch = Launch(
            _split if warps == 8 else _shared,
            (x_dtype, out_dtype, bias, tensor_class(self.row_scale), rows, columns, tiles_per_block, constants),
            (cdiv(tokens, block_m) * cdiv(rows, block_n), split_k, 1),
            device,
            num_warps=4,
            launch_pdl=overlapped,
        )

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """x: float16 or bfloat16 `[M, K]` in the weight's stored column order, 16-byte aligned, and so its rows."""
        self.launch(self.arguments(x, bias, out))

    def arguments(self, x: Any, bias: Any, out: Any) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them; column scales as they are now."""
        c_desc = self.w_desc
        if self.col_scale is not None:
            c_desc = _descriptor(column_scales(self.col_scale, self.dtype), *self.c_box)
        x_desc = _descriptor(x, *self.x_box, self.x_shape, self.x_strides)
        return x_desc, self.w_desc, c_desc, out, out if bias is None else bias, self.row_scale, *self.rest


_shared, _split = Launcher(_shared_kernel), Launcher(_split_kernel)
_Box = tuple[list[int], gl.NVMMASharedLayout]


@cache
def _boxes(dtype: torch.dtype, planes: int, block_m: int, block_n: int, tiles: int) -> tuple[_Box, _Box, _Box]:
    """What the copy engine brings at a time of x, the weight and the column scales, and how it lies there."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    x_box = [block_m, 128 * tiles]
    # a box is a power of two: three planes come one by one
    w_box = [block_n, 16 if planes == 3 else 16 * planes * tiles]
    return (
        (x_box, gl.NVMMASharedLayout.get_default_for(x_box, kind)),
        (w_box, gl.NVMMASharedLayout(0, 8)),
        ([128], gl.NVMMASharedLayout(0, 16, rank=1)),
    )


def _descriptor(
    tensor: Any,
    box: list[int],
    layout: gl.NVMMASharedLayout,
    shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` without its checks, which take longer than a launch: `gemm` has made them."""
    made = object.__new__(TensorDescriptor)
    made.base = tensor
    made.shape = shape or tensor.shape
    made.strides = strides or tensor.stride()
    made.block_shape = box
    made.layout = layout
    made.padding = "zero"
    return made
