"""Which columns of a block are salient and which weights form the group of large ones (BiLLM, arXiv 2402.04291, Sec.
3.2 and 3.3; the column-group bitmap of ARB-LLM, arXiv 2410.03129, Sec. 3.5).

Every search minimizes the squared error of residual binarization over a grid of candidates at once. With means and
scales at their closed forms that error is

    sum of v^2 - sum over rows, groups, orders of count * (mean^2 + scale^2)

so only the second sum, the *gain*, is compared.
"""

from __future__ import annotations

import torch

from .split_kernel import has_kernel, split_gain

MAX_SALIENT = 49  # candidates 1..49, as BiLLM released it
QUANTILES = (0.10, 0.90, 81)  # the grid of break points, as BiLLM released it


def salient_columns(score: torch.Tensor, choice: str | int) -> torch.Tensor:
    """The salient columns of a block.

    Columns are ranked by the sum of their scores; "search" takes the number, 1 to 49, with the least squared error of
    the scores when both the salient and the other columns are binarized at order 2. (Searching on the weights instead
    takes more columns: SmolLM2-135M then has 3.04 bits in place of 2.93.)

    Args:
        score: float `[N, k]`, not negative.
        choice: "search", or a number of columns.

    Returns:
        int64 `[s]`, ascending, `0 <= s < k`.
    """
    columns = score.shape[1]
    order = torch.argsort(score.sum(0), descending=True, stable=True)
    if choice == "search":
        limit = min(MAX_SALIENT, columns - 1)
        count = 1 + int(_salient_gain(score[:, order], limit).argmax()) if limit else 0
    else:
        count = min(int(choice), columns - 1)
    return order[:count].sort().values


def _salient_gain(values: torch.Tensor, limit: int) -> torch.Tensor:
    """The gain of taking the first 1..limit columns of `[N, k]` as the salient ones, float64 `[limit]`."""
    if has_kernel(values):
        return split_gain(values, torch.arange(1, limit + 1, device=values.device), 2)
    rows, columns = values.shape
    gain = torch.empty(limit, dtype=torch.float64, device=values.device)
    position = torch.arange(columns, device=values.device)
    chunk = max(1, 2**19 // max(1, rows * columns))  # 2 MiB of float32 at a time: stays in cache, 2x faster than 32
    for start in range(0, limit, chunk):
        count = torch.arange(start + 1, min(limit, start + chunk) + 1, device=values.device)
        first = (position < count[:, None]).to(values.dtype)  # [C, k]
        sides = torch.stack([first, 1 - first])  # [2, C, k]
        size = sides.sum(2)[:, :, None]  # [2, C, 1]
        side = (1 - first).long()
        total = torch.zeros(len(count), dtype=torch.float64, device=values.device)
        residual = values[None]
        for _ in range(2):
            # means of both sides in one product, then spread over the columns: [2, C, N] -> [C, N, k]
            mean = _side_sums(residual, sides) / size
            residual = residual - _spread(mean, side)
            scale = _side_sums(residual.abs(), sides) / size
            total += ((mean.double().square() + scale.double().square()) * size).sum((0, 2))
            level = _spread(scale, side)
            residual = residual - torch.where(residual >= 0, level, -level)
        gain[start : start + len(count)] = total
    return gain


def _side_sums(values: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Sums over each side's columns: `[C or 1, N, k]`, `[2, C, k]` -> `[2, C, N]`."""
    if len(values) == 1:
        return torch.einsum("nk,sck->scn", values[0], sides)
    return torch.einsum("cnk,sck->scn", values, sides)


def _spread(per_side: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """`[2, C, N]` to `[C, N, k]`: the value of each column's side."""
    pick = side[:, None, :].to(per_side.dtype)
    return torch.lerp(per_side[0][:, :, None], per_side[1][:, :, None], pick)


def large_weights(values: torch.Tensor, magnitude: torch.Tensor, order: int) -> torch.Tensor:
    """The group of large weights of a zone: those with `|value| >= t`, t the candidate of least squared error.

    Args:
        values: float `[N, k]`, what is split and measured: the weights, or the scores as published.
        magnitude: float, any shape: the 81 quantiles from 0.10 to 0.90 of its entries are the candidates for t.
        order: the order at which both groups are binarized, 1 or 2.

    Returns:
        bool `[N, k]`.
    """
    if not values.numel() or not magnitude.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    low, high, steps = QUANTILES
    thresholds = _quantiles(magnitude.flatten().double(), torch.linspace(low, high, steps, dtype=torch.float64))
    gain = _split_gain(values.double(), thresholds, order)
    return values.abs().double() >= thresholds[gain.argmax()]


def _quantiles(values: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Quantiles by linear interpolation (`torch.quantile` stops at 2^24 entries)."""
    ordered = values.sort().values
    position = fractions.to(values.device) * (len(ordered) - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


class _SortedRows:
    """Rows sorted once, so that sums over any interval of values cost a search and a subtraction."""

    def __init__(self, values: torch.Tensor):
        self.values = values.sort(1).values
        self.prefix = torch.nn.functional.pad(self.values.cumsum(1), (1, 0))

    def below(self, bound: torch.Tensor) -> torch.Tensor:
        """How many values of each row are smaller than `bound` `[N, C]`."""
        return torch.searchsorted(self.values, bound.contiguous())

    def up_to(self, bound: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.values, bound.contiguous(), right=True)

    def total(self, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        return self.prefix.gather(1, stop) - self.prefix.gather(1, start)


Intervals = list[tuple[torch.Tensor, torch.Tensor]]


def _moments(rows: _SortedRows, intervals: Intervals, centre: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Count, mean and mean absolute deviation (from `centre`, or the mean) of a union of intervals, each `[N, C]`."""
    count = torch.stack([stop - start for start, stop in intervals]).sum(0).double()
    size = count.clamp(min=1)
    mean = torch.stack([rows.total(start, stop) for start, stop in intervals]).sum(0) / size
    centre = mean if centre is None else centre
    middle = rows.below(centre)
    deviation = torch.zeros_like(mean)
    for start, stop in intervals:
        split = torch.minimum(torch.maximum(middle, start), stop)
        deviation += rows.total(split, stop) - rows.total(start, split)
        deviation += centre * ((split - start) - (stop - split)).double()
    return count, mean, deviation / size


def _split_gain(values: torch.Tensor, thresholds: torch.Tensor, order: int) -> torch.Tensor:
    """The gain of the split at each threshold, float64 `[C]`.

    In a sorted row the small group is one interval and the large group the two around it.
    """
    if has_kernel(values):
        return split_gain(values, thresholds, order)
    rows = _SortedRows(values)
    bound = thresholds.expand(len(values), -1)
    lower, upper = rows.up_to(-bound), rows.below(bound)
    upper = torch.maximum(lower, upper)  # at t = 0 no weight is small
    zero, end = torch.zeros_like(lower), torch.full_like(lower, values.shape[1])
    gain = torch.zeros(len(thresholds), dtype=torch.float64, device=values.device)
    for intervals in ([(zero, lower), (upper, end)], [(lower, upper)]):
        count, mean, scale = _moments(rows, intervals, None)
        gain += (count * (mean.square() + scale.square())).sum(0)
        if order == 2:
            gain += _second_order_gain(rows, intervals, count, mean, scale).sum(0)
    return gain


def _second_order_gain(rows, intervals: Intervals, count, mean, scale) -> torch.Tensor:
    """What the second binarization of the residual `v - mean -+ scale` adds, `[N, C]`."""
    middle = rows.below(mean)
    sides: list[Intervals] = [[], []]
    for start, stop in intervals:
        split = torch.minimum(torch.maximum(middle, start), stop)
        sides[0].append((split, stop))
        sides[1].append((start, split))
    positive = torch.stack([stop - start for start, stop in sides[0]]).sum(0).double()
    size = count.clamp(min=1)
    second_mean = -scale * (2 * positive - count) / size
    deviation = torch.zeros_like(mean)
    for sign, side in zip((1, -1), sides, strict=True):
        side_count, _, side_deviation = _moments(rows, side, mean + sign * scale + second_mean)
        deviation += side_count * side_deviation
    second_scale = deviation / size
    return count * (second_mean.square() + second_scale.square())
