"""The kernels of the fused product on sm_90: packed tiles become the register operand of warpgroup products.

Every warpgroup owns some rows of the weight and BLOCK_M tokens and walks the packing tiles, 128 columns each. The
tensor copy engine brings the packed bytes of TILES tiles and the tokens' columns into a ring of STAGES slots of shared
memory. W is the left operand, so that the decoded weights (`hopper_decode.py`) never leave their registers.

A warpgroup waits for its product before it decodes on: ptxas keeps the registers of a left operand only until the
product is issued, and a decode beside it would change them under its hands. What keeps the tensor cores busy is
another warpgroup's product: several small programs on a multiprocessor (`_shared_kernel`), or one large program
(`_split_kernel`) whose warpgroups share the tokens' columns, meet nowhere, and have them brought by a warp of its own.

Where x comes multiplied by the column scales of SPREAD planes, `[x * c0, x * c1]` for each 128 columns, the product is
that of one plane with as many times the tiles: the planes of a tile lie side by side in the weight too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_decode import BYTES, TILE, _decode, _load_scales, _row_layout
from .launch import Launcher

# When a program waits for the end of the launch before (PDL; 0: the launches do not overlap): before it reads anything,
# or when it has done its work, since that launch is a product too, which writes nothing that this one touches, and has
# waited for what this one reads. All wait, so that no launch ends before those before it.
FIRST, LAST = gl.constexpr(1), gl.constexpr(2)

# other names from Triton 3.8 and 3.7 on; 3.9 and 3.7 do not have the old ones
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


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
        _copy(w_desc, [n, (tile * PLANES + copy) * BYTES], bar, bits.index(slot * COPIES + copy), pred=pred)
    if COLUMNS:
        for t in gl.static_range(TILES):
            for p in gl.static_range(PLANES):
                _copy(
                    c_desc, [p * K + (tile + t) * TILE], bar, columns.index((slot * TILES + t) * PLANES + p), pred=pred
                )
    _copy(x_desc, [m, tile * TILE], bar, x_ring.index(slot), pred=pred)


@gluon.jit
def _stage_scales(
    pointer, tile, tiles_per_block, last,
    PLANES: gl.constexpr, SPREAD: gl.constexpr, SCALES: gl.constexpr, DTYPE: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The row scales of the TILES tiles from number `tile` on (TILES is 1 or 2)."""
    first = _load_scales(pointer, tile, tiles_per_block, last, PLANES, SPREAD, SCALES, DTYPE)
    second = first
    if TILES == 2:
        second = _load_scales(pointer, tile + 1, tiles_per_block, last, PLANES, SPREAD, SCALES, DTYPE)
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
def _store(sums, out, bias, split, m, n, M, N, stride, HAS_BIAS: gl.constexpr):
    """out[m, n] (or float32 [split, m, n]) of one tile, through a layout whose threads hold neighbouring n; `stride`
    from m to m."""
    WARPS: gl.constexpr = gl.num_warps()
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    result = sums.to(out.dtype.element_ty)
    result = gl.convert_layout(result, STORE)
    to_n = n + gl.arange(0, sums.shape[0], gl.SliceLayout(1, STORE))
    to_m = m + gl.arange(0, sums.shape[1], gl.SliceLayout(0, STORE))
    if HAS_BIAS:
        added = gl.load(bias + gl.minimum(to_n, N - 1)).to(gl.float32)
        result = (result.to(gl.float32) + gl.expand_dims(added, 1)).to(out.dtype.element_ty)
    first = out + split.to(gl.int64) * M * stride
    at = first + gl.expand_dims(to_m.to(gl.int64) * stride, 0) + gl.expand_dims(to_n, 1)
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
def _begin(PDL: gl.constexpr):
    """Lets the next launch begin, where PDL is FIRST once the one before, which may write x, has ended."""
    if PDL == FIRST:
        _wait()
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _wait():
    """Until the launch before this one has ended, and what it wrote is there."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _row_scales(row_scale, row_stride, n, N, LAYOUT: gl.constexpr):
    """Where the scales of this warpgroup's rows begin."""
    rows = gl.minimum(n + gl.arange(0, LAYOUT.shape[0], gl.SliceLayout(1, LAYOUT)), N - 1)
    return row_scale + rows.to(gl.int64) * row_stride


@gluon.jit(do_not_specialize=["M", "row_stride", "share"])
def _shared_kernel(
    x_desc, w_desc, c_desc, out, bias, row_scale, M, N, K, stride, row_stride, tiles_per_block, share,
    PLANES: gl.constexpr, SPREAD: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup (or two in step) a program, which is small enough to share its multiprocessor with others."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_desc.dtype
    MEAN: gl.constexpr = SCALES > PLANES * SPREAD
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
    _begin(PDL)
    for stage in gl.static_range(STAGES):
        _fetch(
            x_desc, w_desc, c_desc, x_ring, bits, columns, ready, start + stage * TILES, stage, m, n, K,
            stage < steps, PLANES, COLUMNS, TILES,
        )  # fmt: skip

    scales = _row_scales(row_scale, row_stride, n, N, LAYOUT)
    last = (tiles // SPREAD - 1) // tiles_per_block
    first, second = _stage_scales(scales, start, tiles_per_block, last, PLANES, SPREAD, SCALES, DTYPE, TILES)
    sums = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    for step in range(steps):
        following = start + (step + 1) * TILES
        next_first, next_second = _stage_scales(
            scales, following, tiles_per_block, last, PLANES, SPREAD, SCALES, DTYPE, TILES
        )  # fmt: skip
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        sums = _product(
            sums, x_ring, bits, columns, slot, first, second,
            0, PLANES, COLUMNS, MEAN, DTYPE, TILES, LAYOUT, OPERAND,
        )  # fmt: skip
        # every warp is past the product of this step: its slot can be filled again
        _barrier()
        ahead = step + STAGES
        _fetch(
            x_desc, w_desc, c_desc, x_ring, bits, columns, ready, start + ahead * TILES, slot, m, n, K,
            ahead < steps, PLANES, COLUMNS, TILES,
        )  # fmt: skip
        first = next_first
        second = next_second
    # what follows may use the ring's memory again
    _barrier()
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    _store(sums, out, bias, split, m, n, M, N, stride, HAS_BIAS)
    if PDL == LAST:
        _wait()


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
    x_ring, bits, columns, ready, empty, out, bias, row_scale, M, N, K, stride, row_stride, tiles_per_block,
    split, start, steps, m, n,
    PART: gl.constexpr, PLANES: gl.constexpr, SPREAD: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The PART-th ROWS rows of a program."""
    DTYPE: gl.constexpr = x_ring.dtype
    MEAN: gl.constexpr = SCALES > PLANES * SPREAD
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LAYOUT: gl.constexpr = _row_layout(ROWS, 4)
    scales = _row_scales(row_scale, row_stride, n + PART * ROWS, N, LAYOUT)
    last = (K // TILE // SPREAD - 1) // tiles_per_block
    first, second = _stage_scales(scales, start, tiles_per_block, last, PLANES, SPREAD, SCALES, DTYPE, TILES)
    sums = gl.zeros([ROWS, BLOCK_M], gl.float32, MMA)
    for step in range(steps):
        following = start + (step + 1) * TILES
        next_first, next_second = _stage_scales(
            scales, following, tiles_per_block, last, PLANES, SPREAD, SCALES, DTYPE, TILES
        )  # fmt: skip
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        sums = _product(
            sums, x_ring, bits, columns, slot, first, second,
            PART, PLANES, COLUMNS, MEAN, DTYPE, TILES, LAYOUT, OPERAND,
        )  # fmt: skip
        # all four warps have read the slot
        _barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        first = next_first
        second = next_second
    _store(sums, out, bias, split, m, n + PART * ROWS, M, N, stride, HAS_BIAS)


@gluon.jit(do_not_specialize=["M", "row_stride", "share"])
def _split_kernel(
    x_desc, w_desc, c_desc, out, bias, row_scale, M, N, K, stride, row_stride, tiles_per_block, share,
    PLANES: gl.constexpr, SPREAD: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    GROUP: gl.constexpr,
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
    _begin(PDL)
    gl.warp_specialize(
        [
            (
                _warpgroup,
                (
                    x_ring, bits, columns, ready, empty, out, bias, row_scale, M, N, K, stride, row_stride,
                    tiles_per_block, split, start, steps, m, n,
                    0, PLANES, SPREAD, COLUMNS, SCALES, HAS_BIAS, BLOCK_M, ROWS, STAGES, TILES,
                ),
            ),
            (
                _warpgroup,
                (
                    x_ring, bits, columns, ready, empty, out, bias, row_scale, M, N, K, stride, row_stride,
                    tiles_per_block, split, start, steps, m, n,
                    1, PLANES, SPREAD, COLUMNS, SCALES, HAS_BIAS, BLOCK_M, ROWS, STAGES, TILES,
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
    if PDL == LAST:
        _wait()


SHARED, SPLIT = Launcher(_shared_kernel), Launcher(_split_kernel)
