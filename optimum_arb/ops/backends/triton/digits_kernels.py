"""The two kernels for few tokens where the tensor cores have no products of one bit: inputs as 8-bit digits, and signs
times them, in plain Triton.

`_prepare` scales the inputs by the column scales, rounds each tile to 16-bit fixed point (3e-5 of the result, as the
one-bit kernel does) and writes it as two digits of 8 bits. `_multiply` reads the stored order. A unit is the 16 bytes
of a plane of a tile, or 8 where tiles have 64 columns: bit j of byte i meets column 16 j + i, so eight shifts give the
signs of all its columns, and one product of matrices is a bit of UNITS units. Each of them has columns of its own in
the operand of x, which is zero outside of them: that keeps their sums apart for their row scales, and at one token
fills columns that would be padding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST = tl.constexpr(127 * 256 + 127)  # of what two signed digits hold, the lower one down to -128
LEAST = tl.constexpr(1e-33)  # inputs of a tile that is smaller than this are zero: MOST / LEAST is a float32


@triton.jit(do_not_specialize=["M", "T"])
def _prepare_kernel(
    digits,
    steps,
    x,
    permutation,
    col_scale,
    M,
    K,
    T,
    x_stride,
    COLS: tl.constexpr,
    PERMUTED: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """x [M, K] to int8 [inputs, T, 8 (bit), M, 2 (high, low), TILE / 8] and float32 [inputs, T, M], what 1 stands for.

    Grid (T, M, inputs). COLS: the column scale of each input, -1 for none.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    BYTES: tl.constexpr = TILE // 8
    tile = tl.program_id(0)
    m = tl.program_id(1)
    source = tl.program_id(2)
    slot = tl.arange(0, TILE)
    bit = slot // BYTES
    byte = slot % BYTES
    width = tl.minimum(K - tile * TILE, TILE)
    count = (width + 7) // 8
    within = bit * count + byte
    inside = (byte < count) & (within < width)
    column = tile * TILE + within
    factor = tl.full([TILE], 1.0, tl.float32)
    for i in tl.static_range(len(COLS)):
        if COLS[i] >= 0:
            here = inside & (source == i)
            scale = tl.load(col_scale + COLS[i] * K + column, mask=here, other=0).to(tl.float32)
            factor = tl.where(source == i, scale, factor)
    if PERMUTED:
        column = tl.load(permutation + column, mask=inside, other=0).to(tl.int32)
    values = tl.load(x + m.to(tl.int64) * x_stride + column, mask=inside, other=0).to(tl.float32)
    values = tl.where(inside, values * factor, 0.0)
    most = tl.max(tl.abs(values), 0)
    bad = tl.max((values != values).to(tl.int32), 0)
    rounded = tl.floor(values * tl.where(most > LEAST, tl.div_rn(MOST + 0.0, tl.maximum(most, LEAST)), 0.0) + 0.5)
    number = tl.where(tl.abs(rounded) <= MOST, rounded, 0.0).to(tl.int32)  # of what is no number any will do
    high = (number + 128) >> 8
    at = digits + (((source * T + tile) * 8 + bit) * M + m) * (2 * BYTES) + byte
    tl.store(at, high.to(tl.int8))
    tl.store(at + BYTES, (number - high * 256).to(tl.int8))
    step = tl.where(most > LEAST, tl.div_rn(most, MOST + 0.0), 0.0)
    tl.store(steps + (source * T + tile) * M + m, tl.where(bad != 0, float("nan"), step))


# -64 where the top bit of a byte is 1, else 64, and the next bit
_SIGNS = tl.constexpr("{ lop3.b32 $0, $2, 0x80808080, 0x40404040, 0x6A; shl.b32 $1, $2, 1; }")


@triton.jit
def _next_signs(q, ASSEMBLY: tl.constexpr):
    """int8: -64 where the top bit is 1, else 64; and q shifted to the next bit.

    Triton does bytes one by one, which takes three times as many instructions in all: four at once need assembly, and
    LLVM has no registers for four bytes in that of an AMD GPU. A bit that a byte gets from its neighbour never comes to
    its top.
    """
    if ASSEMBLY:
        signs, rest = tl.inline_asm_elementwise(_SIGNS, "=r,=r,r", [q], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        signs = ((q & -128) ^ 64).to(tl.int8)
        rest = (q << 1).to(tl.int8)
    return signs, rest


@triton.jit
def _add_product(a, b, c, BATCH: tl.constexpr):
    """a b + c of int8 and int32, of BATCH equal parts of the rows one by one."""
    if BATCH == 1:
        return tl.dot(a, b, c, out_dtype=tl.int32)
    ROWS: tl.constexpr = a.shape[0] // BATCH
    parts = tl.reshape(a, (BATCH, ROWS, a.shape[1]))
    b = tl.broadcast_to(b[None, :, :], (BATCH, b.shape[0], b.shape[1]))
    c = tl.dot(parts, b, tl.reshape(c, (BATCH, ROWS, c.shape[1])), out_dtype=tl.int32)
    return tl.reshape(c, (a.shape[0], c.shape[2]))


@triton.jit
def _of_term(term, TERMS: tl.constexpr, FIELD: tl.constexpr):
    """The integer that stands at FIELD of each term of a tensor of their numbers."""
    found = tl.zeros_like(term) + TERMS[0][FIELD]
    for t in tl.static_range(1, len(TERMS)):
        found = tl.where(term == t, TERMS[t][FIELD], found)
    return found


@triton.jit
def _scales(
    steps, scale_rows, step, token, M, T, TERMS: tl.constexpr, ROW_SCALES: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Of a step: what 1 stands for, [UNITS * TOKENS], and the row scales [rows, UNITS]; 0 past the last unit."""
    NTERMS: tl.constexpr = len(TERMS)
    unit = step * UNITS + tl.arange(0, UNITS * TOKENS) // TOKENS
    term = unit % NTERMS
    factor = tl.zeros([UNITS * TOKENS], tl.float32)
    for t in tl.static_range(NTERMS):
        factor = tl.where(term == t, -TERMS[t][4] / 64, factor)
    at = steps + (_of_term(term, TERMS, 3) * T + unit // NTERMS) * M + token
    value = tl.load(at, mask=unit < T * NTERMS, other=0) * factor
    unit = step * UNITS + tl.arange(0, UNITS)
    block = tl.zeros_like(unit)
    if TILES_PER_BLOCK > 0:
        block = unit // NTERMS // TILES_PER_BLOCK
    scale_at = block * ROW_SCALES + _of_term(unit % NTERMS, TERMS, 2)
    return value, tl.load(scale_rows + scale_at[None, :], mask=(unit < T * NTERMS)[None, :], other=0)


@triton.jit(do_not_specialize=["M", "T"])
def _multiply_kernel(
    out,
    digits,
    steps,
    bias,
    weight,
    row_scale,
    M,
    N,
    K,
    T,
    weight_stride,
    row_stride,
    TERMS: tl.constexpr,
    PLANES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    ROW_ALIGNED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EVEN: tl.constexpr,
    NARROW: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OVERLAP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """out[m, n] (or [split, m, n], summed later) of all tokens and BLOCK_N rows. Grid (rows / BLOCK_N, SPLIT_K).

    TERMS: (plane or -1, second plane or -1, row scale, input, factor) of each. PRODUCTS: whether a term has two
    planes or none. EVEN: whether each step has UNITS units. NARROW: whether the last tile has fewer columns. BATCH: how
    many products of matrices the rows are.
    """
    BYTES: tl.constexpr = TILE // 8
    NTERMS: tl.constexpr = len(TERMS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    split = tl.program_id(1)
    # the two sides of a product of matrices: bytes of UNITS units, and (unit, token, digit)
    inner = tl.arange(0, UNITS * BYTES)
    byte = inner % BYTES
    outer = tl.arange(0, UNITS * TOKENS * 2)
    own = (outer // (TOKENS * 2))[:, None] == (inner // BYTES)[None, :]
    part = tl.minimum(outer // 2 % TOKENS, M - 1) * 2 + outer % 2
    token = tl.minimum(tl.arange(0, UNITS * TOKENS) % TOKENS, M - 1)
    weight_rows = weight + rows[:, None] * weight_stride
    scale_rows = row_scale + rows[:, None] * tl.multiple_of(row_stride, ROW_ALIGNED)
    units = T * NTERMS
    share = tl.cdiv(tl.cdiv(units, UNITS), SPLIT_K)
    start = split * share
    stop = tl.minimum(start + share, tl.cdiv(units, UNITS))
    whole = K // TILE
    narrow = (K - whole * TILE + 7) // 8
    sums = tl.zeros([BLOCK_N, UNITS * TOKENS], tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    value, scale = _scales(
        steps, scale_rows, start, token, M, T, TERMS, ROW_SCALES, TILES_PER_BLOCK, TOKENS, UNITS
    )  # fmt: skip
    for step in range(start, stop):
        # a step ahead: Triton does so of its own for the operands of products alone
        next_value, next_scale = _scales(
            steps, scale_rows, step + 1, token, M, T, TERMS, ROW_SCALES, TILES_PER_BLOCK, TOKENS, UNITS
        )  # fmt: skip
        # the bytes of UNITS planes
        unit = step * UNITS + inner // BYTES
        tile = unit // NTERMS
        plane = _of_term(unit % NTERMS, TERMS, 0)
        source = _of_term(unit % NTERMS, TERMS, 3)
        there = unit < units
        read = there
        width = tl.full([UNITS * BYTES], BYTES, tl.int32)
        if NARROW:
            width = tl.where(tile < whole, BYTES, narrow)
            read = there & (byte < width)
        first = tile * (PLANES * BYTES) + byte
        if PRODUCTS:
            read = read & (plane >= 0)
        if EVEN and not NARROW and not PRODUCTS:
            q = tl.load(weight_rows + (first + plane * BYTES)[None, :])
        else:
            # -1 is the plane of a mean; otherwise any will do, x being 0 there
            none: tl.constexpr = 255 if PRODUCTS else 0
            q = tl.load(weight_rows + (first + plane * width)[None, :], mask=read[None, :], other=none)
        if PRODUCTS:
            second = _of_term(unit % NTERMS, TERMS, 1)
            both = read & (second >= 0)
            # equal signs give +1; where there is no second plane, the first one's stay
            q = q ^ 255 ^ tl.load(weight_rows + (first + second * width)[None, :], mask=both[None, :], other=255)
        q = q.to(tl.int8, bitcast=True)
        x_at = digits + (source * T + tile)[None, :] * (8 * 2 * BYTES * M) + part[:, None] * BYTES + byte[None, :]
        x_there = own
        if not EVEN:
            x_there = own & there[None, :]
        products = tl.zeros([BLOCK_N, UNITS * TOKENS * 2], tl.int32)
        for j in tl.static_range(8):
            x = tl.load(x_at + (7 - j) * (2 * BYTES * M), mask=x_there, other=0)
            signs, q = _next_signs(q, ASSEMBLY)
            products = _add_product(signs, tl.trans(x), products, BATCH)
        high, low = tl.split(tl.reshape(products, (BLOCK_N, UNITS * TOKENS, 2)))
        # below 2^29, with 64 as a factor, and so a float32
        found = ((high << 8) + low).to(tl.float32)
        scale = tl.broadcast_to(scale.to(tl.float32)[:, :, None], (BLOCK_N, UNITS, TOKENS))
        sums += found * value[None, :] * tl.reshape(scale, (BLOCK_N, UNITS * TOKENS))
        value, scale = next_value, next_scale
    total = tl.sum(tl.reshape(sums, (BLOCK_N, UNITS, TOKENS)), 1)
    if HAS_BIAS:
        total += tl.load(bias + rows).to(tl.float32)[:, None]
    m = tl.arange(0, TOKENS)
    at = out + split.to(tl.int64) * M * N + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])
