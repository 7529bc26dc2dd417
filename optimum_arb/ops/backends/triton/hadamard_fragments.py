"""The block Hadamard transform of 128 columns by one warp, as PTX for Triton's inline assembly.

A lane holds four neighbouring columns. A stage s of the transform adds and subtracts columns whose numbers differ in
bit s alone: stages 0 and 1 within the lane, the others with the lane whose number differs in bit s - 2.

Where r < 128 columns are left, these are cut into powers of two, the largest first: column i belongs to the block of
2^b columns with b the highest bit of i xor r, so that stage s is one of its transform where i xor r >= 2^(s + 1). (With
r = 128 that is every stage.)
"""

from __future__ import annotations

STAGES = 7  # of 128 columns


def butterflies(stages: int, ragged: bool) -> str:
    """The unscaled transform in blocks of at most 2^`stages` columns, in float32.

    Operands: $0-$3 out, $4-$7 the columns, and if `ragged` $8-$11 (one is used) the number of columns that there are;
    what lies beyond has to be zero.
    """
    lines = ["{ .reg .b32 v<4>; .reg .b32 l, k, y, t, u, g; .reg .pred p, q;"]
    lines += [f"mov.b32 v{j}, ${4 + j};" for j in range(4)]
    lines.append("mov.u32 l, %laneid;")
    if ragged:
        lines.append("mad.lo.s32 k, l, 4, 0; xor.b32 k, k, $8;")
    for stage in range(min(stages, 2)):
        for first in (0, 2 - stage):
            second = first + (1 << stage)
            if not ragged:
                lines.append(f"add.f32 t, v{first}, v{second}; sub.f32 v{second}, v{first}, v{second};")
                lines.append(f"mov.b32 v{first}, t;")
                continue
            # of a lane's columns, only those of stage 0 may belong to several blocks
            lines.append(f"xor.b32 y, k, {first}; setp.gt.u32 p, y, {(2 << stage) - 1};")
            lines.append(f"add.f32 t, v{first}, v{second}; sub.f32 u, v{first}, v{second};")
            lines.append(f"selp.b32 v{first}, t, v{first}, p; selp.b32 v{second}, u, v{second}, p;")
    for stage in range(2, stages):
        step = 1 << (stage - 2)
        lines.append(f"and.b32 t, l, {step}; setp.eq.u32 p, t, 0; selp.f32 g, 0f3F800000, 0fBF800000, p;")
        if ragged:
            lines.append(f"setp.gt.u32 q, k, {(2 << stage) - 1};")
        for j in range(4):
            lines.append(f"shfl.sync.bfly.b32 y, v{j}, {step}, 31, -1; fma.rn.f32 t, v{j}, g, y;")
            lines.append(f"selp.b32 v{j}, t, v{j}, q;" if ragged else f"mov.b32 v{j}, t;")
    lines += [f"mov.b32 ${j}, v{j};" for j in range(4)]
    return " ".join(lines) + " }"


def butterflies_constraints(ragged: bool) -> str:
    return ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * (4 * ragged))


def gather() -> str:
    """Column `i` of a warp's 128 for each of a lane's four.

    Operands: $0-$3 out, $4-$7 the columns, $8-$11 the four numbers i.
    """
    lines = ["{ .reg .b32 a, b, c, d, l, k; .reg .b32 o<4>; .reg .pred p, q;"]
    for j in range(4):
        lines.append(f"shr.u32 l, ${8 + j}, 2; and.b32 k, ${8 + j}, 1; setp.eq.u32 p, k, 0;")
        lines.append(f"and.b32 k, ${8 + j}, 2; setp.eq.u32 q, k, 0;")
        lines += [f"shfl.sync.idx.b32 {to}, ${4 + i}, l, 31, -1;" for i, to in enumerate("abcd")]
        lines.append(f"selp.b32 a, a, b, p; selp.b32 c, c, d, p; selp.b32 o{j}, a, c, q;")
    lines += [f"mov.b32 ${j}, o{j};" for j in range(4)]
    return " ".join(lines) + " }"


GATHER_CONSTRAINTS = ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 4)
