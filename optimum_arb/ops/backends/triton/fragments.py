"""Products of sign bits and 16-bit fixed-point inputs on the one-bit tensor cores, as PTX for Triton's inline assembly.

One assembly call of a warp handles a tile of 128 columns and 32 rows. NVIDIA's `mma.m16n8k128` with operands of one bit
counts, for 16 rows and 8 columns, the bits that are set in both operands: the packed sign words are the 16 x 128
operand as they are, and the 128 x 8 operand holds eight bit planes of the input. With x an integer of 16 bits in two's
complement and s in {0, 1} the stored sign bit,

    sum_k (2 s_k - 1) x_k = 2 sum_b w_b popcount(s & plane_b(x)) - sum_k x_k,      w_b = 2^b, and -2^15 for the sign
    bit.

Lane `4 g + t` of a warp (g = 0..7, t = 0..3) holds, in the layout of the instruction's operands,
    signs:  word t (columns of bytes 4t..4t+3) of rows g, g + 8, g + 16, g + 24 of the 32;
    inputs: word t of bit planes g (low) and g + 8 (high), and, the same in every lane, scale and correction of the
    tile; sums:   of the four rows, the planes 2t, 2t + 1, 2t + 8, 2t + 9, in units of 4^t.

`mma` with one-bit operands is native on compute capability 8.0, 8.6, 8.9 and 9.0; later ones emulate it slowly.
"""

from __future__ import annotations

import struct

FIXED_MAX = 32766.0  # not 32767: the approximate reciprocal may be one unit in the last place too large
LANE_WEIGHTS = 85.0  # the sum of 4^t over t = 0..3


def _float(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def prepare() -> str:
    """Four neighbouring inputs a lane (float32) to a lane's part of the input operand: low, high, scale, correction.

    Operands: $0-$3 out (int32 words, the last two hold the bits of floats), $4-$7 the inputs. All lanes of a warp hold
    one tile. The largest magnitude becomes `FIXED_MAX`; NaN and infinity make the scale NaN or infinite, and so the
    result.
    The bytes of the eight lanes of equal t are transposed as 8 x 8 matrices of bits in three exchanges.
    """
    lines = [
        "{ .reg .f32 m<4>; .reg .f32 s; .reg .b32 i<4>; .reg .b32 a, b, l, y, k, r; .reg .s16 h<4>; .reg .pred p;",
        "abs.f32 m0, $4; abs.f32 m1, $5; abs.f32 m2, $6; abs.f32 m3, $7;",
        "max.NaN.f32 m0, m0, m1; max.NaN.f32 m2, m2, m3; max.NaN.f32 m0, m0, m2;",
        # magnitudes are ordered like their bits, and NaN is above infinity
        "mov.b32 a, m0; redux.sync.max.u32 a, a, -1; mov.b32 m0, a;",
        f"rcp.approx.f32 s, m0; mul.f32 s, s, {_float(FIXED_MAX)};",
        "setp.gt.f32 p, m0, 0f00000000; selp.f32 s, s, 0f00000000, p;",
    ]
    lines += [f"mul.f32 m1, ${4 + j}, s; cvt.rni.s16.f32 h{j}, m1; cvt.s32.s16 i{j}, h{j};" for j in range(4)]
    lines += [
        "add.s32 a, i0, i1; add.s32 b, i2, i3; add.s32 a, a, b; redux.sync.add.s32 a, a, -1;",
        # the correction is taken off in each of the four lanes of a row, whose sums count 1, 4, 16 and 64 times
        f"cvt.rn.f32.s32 s, a; mul.f32 s, s, {_float(1 / (2 * LANE_WEIGHTS))}; mov.b32 $3, s;",
        f"mul.f32 m0, m0, {_float(2 / FIXED_MAX)}; mov.b32 $2, m0;",
        "prmt.b32 a, i0, i1, 0x5410; prmt.b32 b, i2, i3, 0x5410;",
        "prmt.b32 i0, a, b, 0x6420; prmt.b32 i1, a, b, 0x7531; mov.u32 l, %laneid;",
    ]
    for step, keep in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        lines.append(
            f"and.b32 k, l, {4 * step}; setp.eq.u32 p, k, 0; selp.b32 k, {keep}, {~keep & 0xFFFFFFFF}, p; "
            f"selp.b32 r, {step}, {32 - step}, p;"
        )
        lines += [
            f"shfl.sync.bfly.b32 y, {word}, {4 * step}, 31, -1; shf.l.wrap.b32 y, y, y, r; "
            f"lop3.b32 {word}, {word}, y, k, 0xE4;"  # (word & k) | (y & ~k)
            for word in ("i0", "i1")
        ]
    lines.append("mov.b32 $0, i0; mov.b32 $1, i1; }")
    return " ".join(lines)


PREPARE_CONSTRAINTS = "=r,=r,=r,=r,f,f,f,f"


def multiply() -> str:
    """Adds row scale times sign product of one plane and one tile to a lane's four row sums.

    Operands: $0-$3 sums out, $4-$7 sign words of four rows, $8-$11 low, high, scale and correction of the input,
    $12-$15 row scales, $16-$19 sums in, $20-$23 (one is used) the weight of plane 2t + 9 relative to plane 2t + 8: 2,
    and
    -2 in the lane that holds the sign bit.
    """
    lines = ["{ .reg .b32 d<8>; .reg .b32 z; .reg .f32 f, c, u; mov.u32 z, 0; mov.b32 u, $10; mov.b32 c, $11;"]
    for pair in (0, 1):
        signs = f"{{${4 + 2 * pair}, ${5 + 2 * pair}}}"
        for word, sums in ((8, "{d0, d1, d2, d3}"), (9, "{d4, d5, d6, d7}")):
            lines.append(
                "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
                f"{sums}, {signs}, {{${word}}}, {{z, z, z, z}};"
            )
        for half in (0, 1):
            row, low, high = 2 * pair + half, 2 * half, 4 + 2 * half
            lines.append(
                f"mad.lo.s32 d{low}, d{low + 1}, 2, d{low}; mad.lo.s32 d{high}, d{high + 1}, $20, d{high}; "
                f"mad.lo.s32 d{low}, d{high}, 256, d{low}; cvt.rn.f32.s32 f, d{low}; sub.f32 f, f, c; mul.f32 f, f, u; "
                f"fma.rn.f32 ${row}, f, ${12 + row}, ${16 + row};"
            )
    return " ".join(lines) + " }"


MULTIPLY_CONSTRAINTS = ",".join(["=&f"] * 4 + ["r"] * 8 + ["f"] * 8 + ["r"] * 4)


def add_sum() -> str:
    """Adds row scale times the sum of the inputs of one tile (a term without signs, a mean) to a lane's four row sums.

    Operands: $0-$3 sums out, $4-$7 the input as in `multiply`, $8-$11 row scales, $12-$15 sums in.
    """
    lines = ["{ .reg .f32 u, c; mov.b32 u, $6; mov.b32 c, $7; mul.f32 u, u, c;"]
    lines += [f"fma.rn.f32 ${row}, u, ${8 + row}, ${12 + row};" for row in range(4)]
    return " ".join(lines) + " }"


ADD_SUM_CONSTRAINTS = ",".join(["=&f"] * 4 + ["r"] * 4 + ["f"] * 8)


# Sign bits as float16 numbers. A float16 whose only bit is bit b < 10 is the subnormal 2^(b - 24): a word of signs
# under the mask 0x00010001 << b is two weights of 0 or 2^(b - 24), without a shift or a conversion. The input of the
# columns whose signs are at bit b brings the factor 2^(14 - b). The upper byte of each half goes down by 8 first.

HALF_SCALE = 2.0**11  # what undoes 2^(b - 24) 2^(14 - b), and the 1/2 of a correction that counts ones for signs


def half_multiply(token_tiles: int) -> str:
    """Adds row scale times sign product of one plane and one tile, for 8 or 16 tokens, to a lane's sums.

    NVIDIA's `mma.m16n8k16` multiplies 16 rows by 16 columns of float16 signs with 8 tokens. Lane `4 g + t` holds word t
    of rows g, g + 8, g + 16, g + 24 of 32; step b takes their bits b, b + 8, b + 16 and b + 24, which are the tile's
    columns 16 b + 4 t, + 1, + 2, + 3. Of the result it holds tokens 2 t and 2 t + 1 of these rows.

    With u = `token_tiles` (1 or 2), operands: the sums out (4 registers: rows g and g + 8, each two tokens; then rows
    g + 16 and g + 24; then the next 8 tokens), four words, 16 u registers of inputs (for each 8 tokens and step b:
    columns 4 t and 4 t + 2, then 4 t + 1 and 4 t + 3), 8 u of their corrections and scales (of tokens 2 t and 2 t + 1,
    twice, as the products' sums begin with them for two rows; then the same of the scales), four row scales, the sums
    in.
    """
    outputs = 8 * token_tiles
    words = outputs
    inputs = words + 4
    factors = inputs + 16 * token_tiles
    rows = factors + 8 * token_tiles
    sums = rows + 4
    lines = [f"{{ .reg .b32 w<4>; .reg .b32 a<8>; .reg .f32 d<{outputs}>, c<{4 * token_tiles}>; .reg .f32 u, f;"]
    lines += [f"shr.u32 w{row}, ${words + row}, 8;" for row in range(4)]
    lines += [f"mov.b32 c{i}, ${factors + i // 4 * 8 + i % 4};" for i in range(4 * token_tiles)]
    for bit in range(8):
        mask = f"0x{0x00010001 << bit:08X}"
        for pair in (0, 1):
            lines += [f"and.b32 a{4 * pair + i}, ${words + 2 * pair + i}, {mask};" for i in (0, 1)]
            lines += [f"and.b32 a{4 * pair + 2 + i}, w{2 * pair + i}, {mask};" for i in (0, 1)]
        for tile in range(token_tiles):
            b = inputs + 16 * tile + 2 * bit
            for pair in (0, 1):
                first = 8 * tile + 4 * pair
                found = ", ".join(f"d{first + i}" for i in range(4))
                before = found if bit else ", ".join(f"c{4 * tile + i}" for i in range(4))
                a = ", ".join(f"a{4 * pair + i}" for i in range(4))
                lines.append(
                    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                    f"{{{found}}}, {{{a}}}, {{${b}, ${b + 1}}}, {{{before}}};"
                )
    for tile in range(token_tiles):
        for column in (0, 1):
            lines.append(f"mov.b32 u, ${factors + 8 * tile + 4 + column};")
            for row in range(4):
                i = 8 * tile + 2 * row + column
                lines.append(f"mul.f32 f, d{i}, u; fma.rn.f32 ${i}, f, ${rows + row}, ${sums + i};")
    return " ".join(lines) + " }"


def half_constraints(token_tiles: int) -> str:
    return ",".join(["=&f"] * (8 * token_tiles) + ["r"] * (4 + 24 * token_tiles) + ["f"] * (4 + 8 * token_tiles))


def half_add_sum(token_tiles: int) -> str:
    """Adds row scale times the sum of the inputs of one tile (a mean) to a lane's sums.

    Operands: the sums out, the corrections and scales, the row scales and the sums in of `half_multiply`.
    """
    factors = 8 * token_tiles
    rows = factors + 8 * token_tiles
    sums = rows + 4
    lines = ["{ .reg .f32 u, c;"]
    for tile in range(token_tiles):
        for column in (0, 1):
            first = factors + 8 * tile + column
            lines.append(f"mov.b32 u, ${first + 4}; mov.b32 c, ${first}; mul.f32 u, u, c; sub.f32 u, 0f80000000, u;")
            for row in range(4):
                i = 8 * tile + 2 * row + column
                lines.append(f"fma.rn.f32 ${i}, u, ${rows + row}, ${sums + i};")
    return " ".join(lines) + " }"


def half_add_sum_constraints(token_tiles: int) -> str:
    return ",".join(["=&f"] * (8 * token_tiles) + ["r"] * (8 * token_tiles) + ["f"] * (4 + 8 * token_tiles))
