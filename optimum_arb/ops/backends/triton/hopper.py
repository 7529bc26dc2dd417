"""The fused product on sm_90: packed tiles become the register operand of asynchronous warpgroup products.

One program owns BLOCK_N rows of the weight and BLOCK_M tokens and walks the packing tiles, 128 columns each. The tensor
copy engine brings the packed bytes of a tile and the tokens' columns into a ring of STAGES slots of shared memory. The
product of tile t runs while the signs of tile t + 1 are turned into weights, two at a time, with one shift, one
three-input logic operation and one multiply-add a plane; W is the left operand, so that the decoded weights never
leave their registers.

Written in Gluon, Triton's lower-level language, because plain Triton waits for a product whose register operand changes
in the loop before it goes on.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
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
def _decode(
    bits, columns, slot, r0, r1, r2, mean,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, MEAN: gl.constexpr, DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """The weights [rows, 128] of the tile in this slot, as the left operand of a product."""
    q0 = bits.index(slot * PLANES).load(LAYOUT).to(gl.int16) << 8
    q1 = q0
    q2 = q0
    if PLANES > 1:
        q1 = bits.index(slot * PLANES + 1).load(LAYOUT).to(gl.int16) << 8
    if PLANES > 2:
        q2 = bits.index(slot * PLANES + 2).load(LAYOUT).to(gl.int16) << 8
    r0 = gl.expand_dims(r0, 1)
    r1 = gl.expand_dims(r1, 1)
    r2 = gl.expand_dims(r2, 1)
    mean = gl.expand_dims(mean, 1)
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
    x_desc, w_desc, c_desc, x_ring, bits, columns, ready, tile, step, m, n, K,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, pred,
):  # fmt: skip
    """Asks for tile number `tile` in the slot of step number `step`."""
    slot = step % STAGES
    bar = ready.index(slot)
    size: gl.constexpr = x_desc.block_type.nbytes + PLANES * (
        w_desc.block_type.nbytes + COLUMNS * c_desc.block_type.nbytes
    )
    mbarrier.expect(bar, size, pred=pred)
    for p in gl.static_range(PLANES):
        tma.async_copy_global_to_shared(
            w_desc, [n, (tile * PLANES + p) * BYTES], bar, bits.index(slot * PLANES + p), pred=pred
        )
        if COLUMNS:
            tma.async_copy_global_to_shared(
                c_desc, [p * K + tile * TILE], bar, columns.index(slot * PLANES + p), pred=pred
            )
    tma.async_copy_global_to_shared(x_desc, [m, tile * TILE], bar, x_ring.index(slot), pred=pred)


@gluon.jit(do_not_specialize=["M", "row_stride", "tiles_per_block", "share"])
def _hopper_kernel(
    x_desc, w_desc, c_desc, out, bias, row_scale, M, N, K, row_stride, tiles_per_block, share,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """out[m, n] (or float32 [split, m, n], summed later)."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_desc.dtype
    MEAN: gl.constexpr = SCALES > PLANES
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LAYOUT: gl.constexpr = _row_layout(BLOCK_N, WARPS)

    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    program = gl.program_id(0)
    group = program // (GROUP * tiles_m)
    height = gl.minimum(tiles_n - group * GROUP, GROUP)
    inside = program - group * GROUP * tiles_m
    n = (group * GROUP + inside % height) * BLOCK_N
    m = (inside // height) * BLOCK_M
    split = gl.program_id(1)
    tiles = K // TILE
    start = split * share
    steps = gl.minimum(share, tiles - start)

    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, TILE], x_desc.layout)
    bits = gl.allocate_shared_memory(gl.uint8, [STAGES * PLANES, BLOCK_N, BYTES], w_desc.layout)
    columns = bits
    if COLUMNS:
        columns = gl.allocate_shared_memory(DTYPE, [STAGES * PLANES, TILE], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        _fetch(
            x_desc,
            w_desc,
            c_desc,
            x_ring,
            bits,
            columns,
            ready,
            start + stage,
            stage,
            m,
            n,
            K,
            PLANES,
            COLUMNS,
            STAGES,
            stage < steps,
        )

    rows = gl.minimum(n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)), N - 1)
    scales = row_scale + rows.to(gl.int64) * row_stride
    last = (tiles - 1) // tiles_per_block
    r0, r1, r2, mean = _load_scales(scales, start, tiles_per_block, last, PLANES, SCALES, DTYPE)
    next0, next1, next2, next_mean = _load_scales(scales, start + 1, tiles_per_block, last, PLANES, SCALES, DTYPE)
    mbarrier.wait(ready.index(0), 0)
    w = _decode(bits, columns, 0, r0, r1, r2, mean, PLANES, COLUMNS, MEAN, DTYPE, LAYOUT, OPERAND)
    sums = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    sums = warpgroup_mma(w, x_ring.index(0).permute((1, 0)), sums, is_async=True)
    for step in range(1, steps):
        r0 = next0
        r1 = next1
        r2 = next2
        mean = next_mean
        next0, next1, next2, next_mean = _load_scales(
            scales, start + step + 1, tiles_per_block, last, PLANES, SCALES, DTYPE
        )
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        following = _decode(
            bits, columns, slot, r0, r1, r2, mean, PLANES, COLUMNS, MEAN, DTYPE, LAYOUT, OPERAND,
        )  # fmt: skip
        sums, w = warpgroup_mma_wait(0, deps=(sums, w))
        w = following
        sums = warpgroup_mma(w, x_ring.index(slot).permute((1, 0)), sums, is_async=True)
        # every warp is past the product of the step before: its slot can be filled again
        gl.thread_barrier()
        ahead = step - 1 + STAGES
        _fetch(
            x_desc,
            w_desc,
            c_desc,
            x_ring,
            bits,
            columns,
            ready,
            start + ahead,
            ahead,
            m,
            n,
            K,
            PLANES,
            COLUMNS,
            STAGES,
            ahead < steps,
        )
    sums, w = warpgroup_mma_wait(0, deps=(sums, w))
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))

    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    result = sums.to(out.dtype.element_ty)
    result = gl.convert_layout(result, STORE)
    to_n = n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, STORE))
    to_m = m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    if HAS_BIAS:
        added = gl.load(bias + gl.minimum(to_n, N - 1)).to(gl.float32)
        result = (result.to(gl.float32) + gl.expand_dims(added, 1)).to(out.dtype.element_ty)
    at = out + split.to(gl.int64) * M * N + gl.expand_dims(to_m.to(gl.int64) * N, 0) + gl.expand_dims(to_n, 1)
    gl.store(at, result, mask=gl.expand_dims(to_n < N, 1) & gl.expand_dims(to_m < M, 0))


def launch(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    split_k: int,
    scaled: bool,
    run=None,
) -> None:
    """Fills `out` `[M, N]`, or float32 `[split_k, M, N]` with sums that are still to be added.

    Args:
        x: float16 or bfloat16 `[M, K]` in the weight's stored column order, contiguous, 16-byte aligned.
        packed: a weight of `planes-*` layout in tiles of 128 columns, all whole.
        bias: `[N]`, only where split_k is 1.
        out: the result.
        block_m: tokens of a program, at most 256.
        block_n: weight rows of a program.
        warps: 4, or 8.
        stages: slots of the ring.
        split_k: programs along K.
        scaled: x is multiplied by the (single) column scale already.
    """
    layout = packed.layout
    rows, columns = packed.out_features, packed.in_features
    tokens = x.shape[0]
    kind = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    x_layout = gl.NVMMASharedLayout.get_default_for([block_m, 128], kind)
    w_layout = gl.NVMMASharedLayout(0, 8)
    x_desc = TensorDescriptor.from_tensor(x, [block_m, 128], x_layout)
    w_desc = TensorDescriptor.from_tensor(packed.weight, [block_n, 16], w_layout)
    with_columns = bool(layout.col_scales) and not scaled
    c_desc = w_desc
    if packed.col_scale is not None and with_columns:
        scales = packed.col_scale.to(x.dtype).view(-1)
        c_desc = TensorDescriptor.from_tensor(scales, [128], gl.NVMMASharedLayout(0, 16, rank=1))
    grid = (triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n), split_k)
    (run or _hopper_kernel[grid])(
        x_desc,
        w_desc,
        c_desc,
        out,
        out if bias is None else bias,
        packed.row_scale,
        tokens,
        rows,
        columns,
        packed.row_scale.shape[1],
        columns // 128 if packed.block_size == -1 else packed.block_size // 128,
        triton.cdiv(columns // 128, split_k),
        PLANES=layout.planes,
        COLUMNS=with_columns,
        SCALES=layout.row_scales,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        GROUP=8,
        num_warps=warps,
    )
