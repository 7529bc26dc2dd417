"""The rounds of ARB-RC on a GPU: two launches for the scales of an order, one for the signs (`arb_rc.py` has them).

torch's operators take 60 launches a round at order 1 and 150 at order 2, 30 rounds a block, which cost a GPU more than
the sums do. Column scales need the sums over all rows: each program writes those of its rows, a second launch adds
them up in a fixed order.
"""

from __future__ import annotations

import torch

from .residual import ZoneFit

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or not on Linux: torch's operators do it
    triton = None

TILE = 2048  # elements of a program: 16 rows of 128 columns are 8 registers of 256 threads
WARPS = 8
WIDEST = 1024  # columns of a zone
SUMS = 64  # programs' sums that are added at once, of 16 columns
SUM_COLUMNS = 16


def has_kernels(weight: torch.Tensor) -> bool:
    """Whether the kernels serve a zone `[N, k]`: on a GPU, with Triton, and not too wide for registers."""
    return weight.is_cuda and triton is not None and 0 < weight.shape[1] <= WIDEST and len(weight) > 0


def alternate(weight: torch.Tensor, fit: ZoneFit, num_iterations: int) -> None:
    """All rounds of `arb_rc`, in place.

    Args:
        weight: float32 `[N, k]`.
        fit: the start; float32.
        num_iterations: rounds.
    """
    assert fit.col_scale is not None
    rows, columns = weight.shape
    groups, order = fit.scale.shape[1:]
    width = triton.next_power_of_2(columns)
    tile = max(1, TILE // width)
    programs = triton.cdiv(rows, tile)
    weight, fit.groups = weight.contiguous(), fit.groups.contiguous()
    fit.signs, fit.scale, fit.col_scale = fit.signs.contiguous(), fit.scale.contiguous(), fit.col_scale.contiguous()
    signs = fit.signs.view(torch.uint8)
    sums = torch.empty(2, groups, programs, columns, device=weight.device)
    sizes = {"ORDER": order, "GROUPS": groups, "ROWS": tile, "WIDTH": width, "num_warps": WARPS}
    given = (weight, fit.groups, signs, fit.scale, fit.col_scale)
    for _ in range(num_iterations):
        for o in range(order):
            _row_kernel[(programs,)](*given, sums, rows, columns, programs, WHICH=o, **sizes)
            _column_kernel[(groups, triton.cdiv(columns, SUM_COLUMNS))](
                sums,
                fit.col_scale,
                columns,
                groups,
                WHICH=o,
                ORDER=order,
                PROGRAMS=programs,
                ROWS=SUMS,
                COLUMNS=SUM_COLUMNS,
            )
        if order > 1:
            _sign_kernel[(programs,)](*given, rows, columns, GROUPS=groups, ROWS=tile, WIDTH=width, num_warps=WARPS)


if triton is not None:

    @triton.jit
    def _places(rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """A program's rows, the columns, which of them there are, and its elements `[ROWS, WIDTH]` of a plane."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        real_row, real_column = row < rows, column < columns
        whole = real_row[:, None] & real_column[None, :]
        return row, column, real_row, real_column, whole, row[:, None].to(tl.int64) * columns + column[None, :]

    @triton.jit
    def _row_kernel(
        weight, groups, signs, scale, col_scale, sums, rows, columns, programs,
        WHICH: tl.constexpr, ORDER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """The row scales of order `WHICH` of a program's rows, and its rows' part of the sums of the column scales."""
        row, column, real_row, real_column, whole, at = _places(rows, columns, ROWS, WIDTH)
        plane = rows * columns
        value = tl.load(weight + at, mask=whole, other=0.0)
        bits = tl.load(signs + WHICH * plane + at, mask=whole, other=0)
        for g in tl.static_range(GROUPS):
            mask = tl.load(groups + g * plane + at, mask=whole, other=0.0)
            rest = value
            for o in tl.static_range(ORDER):
                if o != WHICH:
                    size = tl.load(scale + row * (GROUPS * ORDER) + g * ORDER + o, mask=real_row, other=0.0)
                    other = tl.load(col_scale + (g * ORDER + o) * columns + column, mask=real_column, other=0.0)
                    level = size[:, None] * other[None, :]
                    up = tl.load(signs + o * plane + at, mask=whole, other=0)
                    rest = rest - tl.where(up != 0, level, -level)
            target = mask * tl.where(bits != 0, rest, -rest)
            own = tl.load(col_scale + (g * ORDER + WHICH) * columns + column, mask=real_column, other=0.0)
            above = tl.sum(target * own[None, :], 1)
            below = tl.sum(mask * (own * own)[None, :], 1)
            found = tl.where(below > 0, above / tl.maximum(below, 1.1754943508222875e-38), 0.0)
            tl.store(scale + row * (GROUPS * ORDER) + g * ORDER + WHICH, found, mask=real_row)
            to = (g * programs + tl.program_id(0)) * columns + column
            tl.store(sums + to, tl.sum(target * found[:, None], 0), mask=real_column)
            part = tl.sum(mask * (found * found)[:, None], 0)
            tl.store(sums + GROUPS * programs * columns + to, part, mask=real_column)

    @triton.jit
    def _column_kernel(
        sums, col_scale, columns, groups,
        WHICH: tl.constexpr, ORDER: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """The column scales of order `WHICH` of a group, from the sums of all programs."""
        g = tl.program_id(0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        above = tl.zeros([ROWS, COLUMNS], tl.float32)
        below = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, PROGRAMS, ROWS):
            program = start + tl.arange(0, ROWS)
            inside = (program[:, None] < PROGRAMS) & (column[None, :] < columns)
            at = (g * PROGRAMS + program[:, None]) * columns + column[None, :]
            above += tl.load(sums + at, mask=inside, other=0.0)
            below += tl.load(sums + groups * PROGRAMS * columns + at, mask=inside, other=0.0)
        size = tl.sum(below, 0)
        found = tl.where(size > 0, tl.sum(above, 0) / tl.maximum(size, 1.1754943508222875e-38), 0.0)
        tl.store(col_scale + (g * ORDER + WHICH) * columns + column, found, mask=column < columns)

    @triton.jit
    def _sign_kernel(
        weight, groups, signs, scale, col_scale, rows, columns,
        GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Both signs of each weight: the nearest level of its group (`residual.nearest_signs`)."""
        row, column, real_row, real_column, whole, at = _places(rows, columns, ROWS, WIDTH)
        plane = rows * columns
        value = tl.load(weight + at, mask=whole, other=0.0)
        first = tl.zeros([ROWS, WIDTH], tl.float32)
        second = tl.zeros([ROWS, WIDTH], tl.float32)
        for g in tl.static_range(GROUPS):
            mask = tl.load(groups + g * plane + at, mask=whole, other=0.0)
            rows0 = tl.load(scale + row * (GROUPS * 2) + g * 2, mask=real_row, other=0.0)
            rows1 = tl.load(scale + row * (GROUPS * 2) + g * 2 + 1, mask=real_row, other=0.0)
            columns0 = tl.load(col_scale + g * 2 * columns + column, mask=real_column, other=0.0)
            columns1 = tl.load(col_scale + (g * 2 + 1) * columns + column, mask=real_column, other=0.0)
            first += mask * rows0[:, None] * columns0[None, :]
            second += mask * rows1[:, None] * columns1[None, :]
        swap = tl.abs(second) > tl.abs(first)
        large, small = tl.where(swap, second, first), tl.where(swap, first, second)
        large_sign = (value >= 0) == (large >= 0)
        rest = value - tl.where(large_sign, large, -large)
        small_sign = (rest >= 0) == (small >= 0)
        tl.store(signs + at, tl.where(swap, small_sign, large_sign).to(tl.uint8), mask=whole)
        tl.store(signs + plane + at, tl.where(swap, large_sign, small_sign).to(tl.uint8), mask=whole)
