"""The gain of every candidate split of a block on a GPU, in one launch (`partition.py` has the search).

The operators of `partition.py` take about 2,000 launches for a block of 128 columns, which cost a GPU more than the
sums do. Here a program holds some rows in registers and goes through all candidates.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or not on Linux: torch's operators do it
    triton = None

TILE = 4096  # bytes of a program's rows, 8 registers of 128 threads: at twice as many float64 sums spill
WIDEST = 1024  # columns of a block


def has_kernel(values: torch.Tensor) -> bool:
    """Whether the kernel serves a block `[N, k]`: on a GPU, with Triton, and not too wide for registers."""
    return values.is_cuda and triton is not None and 0 < values.shape[1] <= WIDEST and len(values) > 0


def split_gain(values: torch.Tensor, bounds: torch.Tensor, order: int) -> torch.Tensor:
    """The gain of each split in two groups, both binarized at `order`.

    Args:
        values: float `[N, k]`, float32 or float64, in which a row's sums are made.
        bounds: `[C]`; of a floating dtype, the first group are the entries whose absolute value is at least the bound;
            of an integer dtype, the columns before it.
        order: 1 or 2.

    Returns:
        float64 `[C]`.
    """
    rows, columns = values.shape
    width = triton.next_power_of_2(columns)
    tile = max(1, TILE // (width * values.element_size()))
    programs = triton.cdiv(rows, tile)
    gain = torch.empty(len(bounds), programs, dtype=torch.float64, device=values.device)
    _gain_kernel[(programs,)](
        values.contiguous(),
        bounds.contiguous(),
        gain,
        rows,
        columns,
        programs,
        CANDIDATES=len(bounds),
        BY_COLUMN=not bounds.is_floating_point(),
        ORDER=order,
        ROWS=tile,
        WIDTH=width,
    )
    return gain.sum(1)


if triton is not None:

    @triton.jit
    def _gain_kernel(
        values, bounds, gain, rows, columns, programs, CANDIDATES: tl.constexpr, BY_COLUMN: tl.constexpr,
        ORDER: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program: `ROWS` rows, all candidates; the sum over its rows of each gain."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        whole = (row[:, None] < rows) & (column[None, :] < columns)
        value = tl.load(values + row[:, None].to(tl.int64) * columns + column[None, :], mask=whole, other=0.0)
        one = tl.where(whole, 1.0, 0.0).to(value.dtype)
        size = tl.sum(one, 1)
        for candidate in range(CANDIDATES):
            bound = tl.load(bounds + candidate)
            if BY_COLUMN:
                large = tl.where(column[None, :] < bound, one, 0.0)
            else:
                large = tl.where(tl.abs(value) >= bound, one, 0.0)
            small = one - large
            count = tl.sum(large, 1)
            left = size - count
            # an empty group has sums of zero
            per_large = 1.0 / tl.maximum(count, 1.0)
            per_small = 1.0 / tl.maximum(left, 1.0)
            total = tl.zeros([ROWS], tl.float64)
            residual = value
            for _ in tl.static_range(ORDER):
                mean_large = tl.sum(large * residual, 1) * per_large
                mean_small = tl.sum(small * residual, 1) * per_small
                residual = residual - large * mean_large[:, None] - small * mean_small[:, None]
                scale_large = tl.sum(large * tl.abs(residual), 1) * per_large
                scale_small = tl.sum(small * tl.abs(residual), 1) * per_small
                total += ((mean_large * mean_large + scale_large * scale_large) * count).to(tl.float64)
                total += ((mean_small * mean_small + scale_small * scale_small) * left).to(tl.float64)
                level = large * scale_large[:, None] + small * scale_small[:, None]
                residual = residual - tl.where(residual >= 0, level, -level)
            tl.store(gain + candidate * programs + tl.program_id(0), tl.sum(total, 0))
