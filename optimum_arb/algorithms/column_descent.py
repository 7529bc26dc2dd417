"""Choosing the signs of one column after the other, in all rows at once: the inner loop of every fit under a metric.

A row of the weight is fitted by `sum_p +-row_p col_pj` in column j. Given what all other columns do, the best value
would be `current_j + step_j`; the nearest of the 2^P levels is taken, and the change moves the steps of the columns
that follow: `step_l -= ratio_jl * change`. Columns go in chunks: inside one the changes are carried one by one, what
lies behind it gets them in one product. On a GPU a chunk is one launch (`_chunk_kernel`), where the loop over torch's
operators takes four to eight for each column.
"""

from __future__ import annotations

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or not on Linux: the loop below does it
    triton = None

CHUNK = 32  # columns, on the CPU
KERNEL_CHUNK = 64  # and on a GPU: a tile of 64 x 32 is 16 registers of 128 threads
KERNEL_ROWS = 32


def descend_columns(
    current: torch.Tensor, step: torch.Tensor, row: torch.Tensor, col: torch.Tensor, ratio: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the columns.

    Args:
        current: float32 `[k, N]`, the values before; a column is contiguous.
        step: float32 `[k, N]`, what each value lacks; overwritten.
        row: float32 `[P, N]`.
        col: float32 `[P, k]`.
        ratio: float32 `[k, k]`; only what stands above the diagonal counts.

    Returns:
        The signs, float32 `[P, N, k]`, and the changes of the values, float32 `[k, N]`.
    """
    planes = len(row)
    fused = current.is_cuda and triton is not None
    if planes <= 2 and not fused:
        return _descend_few_planes(current, step, row, col, ratio)
    patterns = sign_patterns(planes, row)
    taken = torch.zeros(current.shape, dtype=torch.uint8, device=current.device)
    changes = torch.empty_like(current)
    width = KERNEL_CHUNK if fused else CHUNK
    run = _run_kernel if fused else _loop
    for start in range(0, len(current), width):
        here = slice(start, min(start + width, len(current)))
        run(current[here], step[here], row, col[:, here], ratio[here, here], patterns, taken[here], changes[here])
        step[here.stop :].addmm_(ratio[here, here.stop :].T, changes[here], alpha=-1)
    return patterns[taken.long()].permute(2, 1, 0).contiguous(), changes


def _descend_few_planes(
    current: torch.Tensor, step: torch.Tensor, row: torch.Tensor, col: torch.Tensor, ratio: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`descend_columns` of one or two planes, by four or seven of torch's operators for each column.

    Levels come in pairs of opposite sign: the nearer one has the sign of the target. Of two planes the larger size then
    is added to, or lessened by, the smaller one, as the target lies beyond the larger one or not.
    """
    levels = row[:, None, :] * col[:, :, None]  # [P, k, N]
    value = levels[0].abs()
    inner = None
    if len(row) == 2:
        other = levels[1].abs()
        swapped = (other > value).to(value.dtype)
        value, inner = torch.maximum(value, other), torch.minimum(value, other)
    changes = torch.empty_like(current)
    goal = torch.empty_like(current[0])
    columns = len(current)
    # a view by an index takes as long as an operator on a column
    each = list(zip(current.unbind(0), step.unbind(0), value.unbind(0), changes.unbind(0), strict=True))
    inners = [] if inner is None else inner.unbind(0)
    for start in range(0, columns, CHUNK):
        stop = min(start + CHUNK, columns)
        for j in range(start, stop):
            before, target, after, change = each[j]
            target.add_(before)
            if inners:
                torch.abs(target, out=goal).sub_(after)
                after.add_(inners[j].copysign_(goal))
            after.copysign_(target)
            torch.sub(after, before, out=change)
            if j + 1 < stop:
                step[j + 1 : stop].addcmul_(ratio[j, j + 1 : stop, None], change, value=-1)
        step[stop:].addmm_(ratio[start:stop, stop:].T, changes[start:stop], alpha=-1)
    one = torch.ones_like(value)
    larger = torch.copysign(one, value)
    if inner is None:
        signs = larger[None]
    else:
        smaller = torch.copysign(one, inner).mul_(larger)
        signs = torch.stack([torch.lerp(larger, smaller, swapped), torch.lerp(smaller, larger, swapped)])
    signs *= torch.copysign(torch.ones_like(levels), levels)
    return signs.transpose(1, 2).contiguous(), changes


def sign_patterns(planes: int, like: torch.Tensor) -> torch.Tensor:
    """All patterns of P signs, pattern i the opposite of pattern `2^P - 1 - i`: `[2^P, P]`, in the dtype of `like`."""
    return _patterns(planes, like.device, like.dtype)


@lru_cache(maxsize=32)
def _patterns(planes: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Kept, so that nothing waits for a copy to a GPU."""
    return torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * planes).view(-1, planes).to(device, dtype)


def _loop(current, step, row, col, ratio, patterns, taken, changes) -> None:
    """A chunk, by torch's operators."""
    by_column = patterns * col.T[:, None, :]  # [c, 2^P, P]
    for j in range(len(current)):
        value = _nearest(by_column[j] @ row, current[j] + step[j], taken[j])
        change = torch.sub(value, current[j], out=changes[j])
        step[j + 1 :].addcmul_(ratio[j, j + 1 :, None], change, value=-1)


def _nearest(levels: torch.Tensor, target: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The level `[N]` of `[2^P, N]` nearest to the target, its index written to `taken`."""
    if len(levels) == 2:  # +-s: the nearer one has the sign of the target
        other = (target >= 0) != (levels[0] >= 0)
        taken.copy_(other)
        return torch.where(other, levels[1], levels[0])
    # one comparison a level: 3 times faster than argmin over the first dimension (113 us at 4 x 1536)
    distance = (levels - target).abs_()
    least, value = distance[0], levels[0]
    for index in range(1, len(levels)):
        nearer = distance[index] < least
        least = torch.minimum(distance[index], least)
        value = torch.where(nearer, levels[index], value)
        taken.masked_fill_(nearer, index)
    return value


def _run_kernel(current, step, row, col, ratio, patterns, taken, changes) -> None:
    """A chunk, in one launch."""
    columns, rows = current.shape
    _chunk_kernel[(triton.cdiv(rows, KERNEL_ROWS),)](
        current,
        step,
        row,
        col.T.contiguous(),
        ratio.contiguous(),
        taken,
        changes,
        rows,
        WIDTH=columns,
        PLANES=len(row),
        COLUMNS=KERNEL_CHUNK,
        ROWS=KERNEL_ROWS,
    )


if triton is not None:

    @triton.jit
    def _chunk_kernel(
        current, step, row, col, ratio, taken, changes, rows,
        WIDTH: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """One program: `ROWS` rows of the weight, all columns of the chunk, their steps in registers."""
        at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = at < rows
        column = tl.arange(0, COLUMNS)
        here = column[:, None] * rows + at[None, :]
        whole = (column[:, None] < WIDTH) & inside[None, :]
        steps = tl.load(step + here, mask=whole, other=0.0)
        for j in range(WIDTH):
            value = tl.load(current + j * rows + at, mask=inside, other=0.0)
            target = value + tl.sum(tl.where(column[:, None] == j, steps, 0.0), 0)
            best = tl.zeros([ROWS], tl.float32)
            index = tl.zeros([ROWS], tl.int32)
            least = tl.full([ROWS], float("inf"), tl.float32)
            for level in tl.static_range(2**PLANES):
                found = tl.zeros([ROWS], tl.float32)
                for plane in tl.static_range(PLANES):
                    size = tl.load(row + plane * rows + at, mask=inside, other=0.0) * tl.load(col + j * PLANES + plane)
                    found += size if (level >> (PLANES - 1 - plane)) % 2 == 0 else -size
                distance = tl.abs(found - target)
                if PLANES == 1:  # as the loop: at the same distance, the one that is not negative
                    nearer = (distance < least) | ((distance == least) & (found > 0))
                else:
                    nearer = distance < least
                least = tl.where(nearer, distance, least)
                best = tl.where(nearer, found, best)
                index = tl.where(nearer, level, index)
            change = best - value
            tl.store(changes + j * rows + at, change, mask=inside)
            tl.store(taken + j * rows + at, index.to(tl.uint8), mask=inside)
            weight = tl.load(ratio + j * WIDTH + column, mask=(column > j) & (column < WIDTH), other=0.0)
            steps -= weight[:, None] * change[None, :]
