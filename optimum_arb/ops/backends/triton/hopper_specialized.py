"""The fused product of many tokens on sm_90: one warpgroup decodes into shared memory, two others only multiply.

A program is three warpgroups that meet at barriers alone:

- The decoder asks the copy engine for the tokens' columns and for packed bytes, turns these into weights, 64 columns
  (half a packing tile) at a time, and stores them where a product reads them: in rows of 128 bytes, swizzled. A warp of
  its own for the copies would cost registers: with a fourth warpgroup ptxas finds no room for sums of 256 columns.
- Two warpgroups, each with half of the tokens, multiply what lies there. One product is always in flight: with both
  operands in shared memory nothing of it is in registers but the sums, so the next is issued before it ends.

A program computes one tile of the result after another, as many as there are for each multiprocessor: while the sums of
one are stored, the decoder fills the rings for the next.

x is the left operand and the weight the right one, so that a thread's sums are neighbours in the result. A step of 64
columns, 128 tokens and 256 rows is 1024 cycles of the tensor cores; shared memory gives their operands in 640 and takes
what is written in 384. For 256 tokens and 128 rows x would be read from the second-level cache twice as fast. The
decoder issues up to three instructions for two weights and plane, 200 a warp and step.

Barriers, each with a phase a round through its ring (a barrier that nothing has passed yet counts as past the phase
of parity 1):

- `ready[slot]`: x has landed (its bytes, and the arrival of who asked) and the weights are stored.
- `empty[slot]`: both warpgroups are past the product that read it. They arrive for step s when they know it to have
  ended, after s + 1 was issued: a ring has two slots or more. Neither side can be a round ahead, each waits for
  the other's.
- `bits_ready[slot]`: packed bytes and column scales have landed. The decoder alone reads them, and asks for the next
  when all of its threads have.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

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

from .hopper_decode import BYTES, TILE, _load_scales
from .hopper_decode_rows import PAIRS, _decode_layout, _weights
from .hopper_kernels import _place
from .launch import Launcher

STEP = gl.constexpr(64)  # columns of a product: 128 bytes, what the copy engine swizzles


@gluon.constexpr_function
def _result_layout(rows, columns):
    """A warpgroup's result [rows, columns], 16 bytes a thread; from the sums' layout without leaving the warp."""
    across = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    down = [[64 << i, 0] for i in range((rows // 64).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *across, [8, 0], *down],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [rows, columns],
    )


@gluon.jit
def _copy_bits(
    w_desc, c_desc, bits, columns, ready, tile, slot, n, K, pred, PLANES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Asks for the packed bytes and the column scales of a packing tile."""
    COPIES: gl.constexpr = PLANES if PLANES == 3 else 1
    size: gl.constexpr = COPIES * w_desc.block_type.nbytes + COLUMNS * PLANES * c_desc.block_type.nbytes
    bar = ready.index(slot)
    mbarrier.expect(bar, size, pred=pred)
    for copy in gl.static_range(COPIES):
        tma.async_copy_global_to_shared(
            w_desc, [n, (tile * PLANES + copy) * BYTES], bar, bits.index(slot * COPIES + copy), pred=pred
        )
    if COLUMNS:
        for p in gl.static_range(PLANES):
            tma.async_copy_global_to_shared(
                c_desc, [p * K + tile * TILE], bar, columns.index(slot * PLANES + p), pred=pred
            )


@gluon.jit
def _outputs(M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many tiles of the result this program computes: number program_id, and each num_programs further."""
    return gl.cdiv(gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N) - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _decoder(
    x_desc, w_desc, c_desc, x_ring, w_ring, bits, columns, ready, empty, bits_ready,
    row_scale, row_stride, tiles_per_block, start, tiles, M, N, K,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, PDL: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BITS_STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: asks for what is to come, and turns packed bytes into weights in shared memory."""
    DTYPE: gl.constexpr = w_ring.dtype
    STORED: gl.constexpr = row_scale.dtype.element_ty
    MEAN: gl.constexpr = SCALES > PLANES
    LAYOUT: gl.constexpr = _decode_layout(BLOCK_N)
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    COPIES: gl.constexpr = PLANES if PLANES == 3 else 1
    # two weights, bytes or column scales at a time
    stored = w_ring._reinterpret(gl.int32, [STAGES, BLOCK_N, STEP // 2], gl.NVMMASharedLayout(128, 32, rank=2))
    packed = bits._reinterpret(gl.int16, [BITS_STAGES * COPIES, BLOCK_N, PAIRS * PLANES // COPIES], PLAIN)
    factors = columns
    if COLUMNS:
        factors = columns._reinterpret(gl.int32, [BITS_STAGES * PLANES * 2, 4, PAIRS], PLAIN)
    last = (K // TILE - 1) // tiles_per_block
    rows = gl.arange(0, BLOCK_N, OF_ROWS)
    for number in range(_outputs(M, N, BLOCK_M, BLOCK_N)):
        m, n = _place(gl.program_id(0) + number * gl.num_programs(0), M, N, BLOCK_M, BLOCK_N, GROUP)
        before = number * tiles  # packing tiles that have gone through the rings
        for stage in gl.static_range(BITS_STAGES):
            _copy_bits(
                w_desc, c_desc, bits, columns, bits_ready, start + stage, (before + stage) % BITS_STAGES, n, K,
                stage < tiles, PLANES, COLUMNS,
            )  # fmt: skip
        of_rows = row_scale + gl.minimum(n + rows, N - 1).to(gl.int64) * row_stride
        scales = _load_scales(of_rows, start, tiles_per_block, last, PLANES, SCALES, STORED)
        if PDL:  # x is what the launch before this one writes; what is read besides was there before that one began
            gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
            gl.inline_asm_elementwise(
                "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
        for i in range(tiles):
            # asked for a tile ahead, and not converted before they are needed: that would wait for them
            next_scales = _load_scales(of_rows, start + i + 1, tiles_per_block, last, PLANES, SCALES, STORED)
            bits_slot = (before + i) % BITS_STAGES
            mbarrier.wait(bits_ready.index(bits_slot), ((before + i) // BITS_STAGES) & 1)
            for half in gl.static_range(2):
                step = 2 * (before + i) + half
                slot = step % STAGES
                column = ()
                if COLUMNS:
                    for p in gl.static_range(PLANES):
                        at = (bits_slot * PLANES + p) * 2 + half
                        column = column + (factors.index(at).load(gl.SliceLayout(0, LAYOUT)),)
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(slot), x_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    x_desc, [m, (start + i) * TILE + half * STEP], ready.index(slot), x_ring.index(slot)
                )
                w = _weights(packed, bits_slot, scales, column, half, PLANES, COLUMNS, MEAN, DTYPE, LAYOUT)
                stored.index(slot).store(w)
                # every thread's stores are seen by products, and every thread has made them, before one says so
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(ready.index(slot), count=1)
            # nobody reads these bytes any more, see the barrier above
            ahead = i + BITS_STAGES
            _copy_bits(
                w_desc, c_desc, bits, columns, bits_ready, start + ahead, bits_slot, n, K,
                ahead < tiles, PLANES, COLUMNS,
            )  # fmt: skip
            scales = next_scales


@gluon.jit
def _multiplier(
    x_ring, w_ring, ready, empty, out, bias, M, N, split, steps,
    PART: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the PART-th half of the tokens of each of the program's tiles."""
    TOKENS: gl.constexpr = BLOCK_M // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    for number in range(_outputs(M, N, BLOCK_M, BLOCK_N)):
        before = number * steps
        sums = gl.zeros([TOKENS, BLOCK_N], gl.float32, MMA)
        for step in range(before, before + steps):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            x = x_ring.index(slot).slice(PART * TOKENS, TOKENS, dim=0)
            sums = warpgroup_mma(x, w_ring.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            # the product before this one has ended, for all of the warpgroup: it is one instruction of its four warps
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > before)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((before + steps - 1) % STAGES), count=1)
        # meanwhile the decoder fills the rings for the next tile
        m, n = _place(gl.program_id(0) + number * gl.num_programs(0), M, N, BLOCK_M, BLOCK_N, GROUP)
        _store_rows(sums, out, bias, split, m + PART * TOKENS, n, M, N, HAS_BIAS)


@gluon.jit
def _store_rows(sums, out, bias, split, m, n, M, N, HAS_BIAS: gl.constexpr):
    """out[m, n] (or float32 [split, m, n])."""
    # four lanes have 32 bytes of a row of float32 as the sums lie, of a smaller type half of what memory moves
    WIDE: gl.constexpr = out.dtype.element_ty.primitive_bitwidth == 32
    LAYOUT: gl.constexpr = sums.type.layout if WIDE else _result_layout(sums.shape[0], sums.shape[1])
    result = gl.convert_layout(sums.to(out.dtype.element_ty), LAYOUT)
    to_m = m + gl.arange(0, sums.shape[0], gl.SliceLayout(1, LAYOUT))
    to_n = n + gl.arange(0, sums.shape[1], gl.SliceLayout(0, LAYOUT))
    if HAS_BIAS:
        added = gl.load(bias + to_n, mask=to_n < N, other=0).to(gl.float32)
        result = (result.to(gl.float32) + gl.expand_dims(added, 0)).to(out.dtype.element_ty)
    at = out + split.to(gl.int64) * M * N + gl.expand_dims(to_m.to(gl.int64) * N, 1) + gl.expand_dims(to_n, 0)
    gl.store(at, result, mask=gl.expand_dims(to_m < M, 1) & gl.expand_dims(to_n < N, 0))


@gluon.jit(do_not_specialize=["M", "row_stride", "share"])
def _specialized_kernel(
    x_desc, w_desc, c_desc, out, bias, row_scale, M, N, K, row_stride, tiles_per_block, share,
    PLANES: gl.constexpr, COLUMNS: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BITS_STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """See the top of this file. BLOCK_M and BLOCK_N are 128 or 256, not both 256."""
    DTYPE: gl.constexpr = x_desc.dtype
    COPIES: gl.constexpr = PLANES if PLANES == 3 else 1
    split = gl.program_id(1)
    start = split * share
    tiles = gl.minimum(share, K // TILE - start)
    steps = 2 * tiles
    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, STEP], x_desc.layout)
    w_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, STEP], gl.NVMMASharedLayout(128, 16, rank=2))
    bits = gl.allocate_shared_memory(gl.uint8, [BITS_STAGES * COPIES, BLOCK_N, w_desc.block_shape[1]], w_desc.layout)
    columns = bits
    if COLUMNS:
        columns = gl.allocate_shared_memory(DTYPE, [BITS_STAGES * PLANES, TILE], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bits_ready = gl.allocate_shared_memory(gl.int64, [BITS_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=2)
    for stage in gl.static_range(BITS_STAGES):
        mbarrier.init(bits_ready.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiplier,
                (
                    x_ring, w_ring, ready, empty, out, bias, M, N, split, steps,
                    0, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES, GROUP,
                ),
            ),
            (
                _multiplier,
                (
                    x_ring, w_ring, ready, empty, out, bias, M, N, split, steps,
                    1, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES, GROUP,
                ),
            ),
            (
                _decoder,
                (
                    x_desc, w_desc, c_desc, x_ring, w_ring, bits, columns, ready, empty, bits_ready,
                    row_scale, row_stride, tiles_per_block, start, tiles, M, N, K,
                    PLANES, COLUMNS, SCALES, PDL, BLOCK_M, BLOCK_N, STAGES, BITS_STAGES, GROUP,
                ),
            ),
        ],
        # of 504 registers for a thread of each the first partition gets what is left
        worker_num_warps=[4, 4],
        worker_num_regs=[168, 168],
    )  # fmt: skip


SPECIALIZED = Launcher(_specialized_kernel)
