"""What keeps a fit from ending worse than round-to-nearest.

BiLLM and ARB set means before the scales around them and end in local minima; ARB-X and ARB-RC fit a block of the
weights, and what counts under calibration is the output; arb-hrc flips signs that one token cannot tell apart. On
degenerate weights all of them can lose to one scale a row and block, which their layouts hold too. So every row is
measured once it is fitted, its scales as they are stored, and one that round-to-nearest meets better is stored as that:
none of 10,368 rows of two layers of SmolLM2-135M with the methods' own choices, 1,848 with a mean a row and no bitmap
(benchmarks/rounded_rows.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import torch

from ..format.packing import BinarizedWeight
from ..format.scales import store_scale
from ..spare_threads import product
from .hessian import PreparedHessian, damped_hessian

CHUNK = 1024  # rows measured at once: their copies must not weigh beside the fit


def round_to_nearest(target: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`sign(W)` with the row scale `mean|W|`: the nearest signs and the least-squares scale (XNOR-Net, arXiv
    1603.05279).

    Args:
        target: float32 `[N, K]`.
        block_size: columns that share a row scale, -1 for all.

    Returns:
        bool `[N, K]`, True = +1, and float32 `[N, blocks]`.
    """
    width = target.shape[1] if block_size == -1 else block_size
    return target >= 0, torch.stack([block.abs().mean(1) for block in target.split(width, 1)], 1)


def row_errors(
    target: torch.Tensor, fit: BinarizedWeight, unit: float, hessian: PreparedHessian | None
) -> Iterator[torch.Tensor]:
    """The squared error of each row, `e H e^T` under the damped calibration matrix, `e e^T` without one.

    Args:
        target: float32 `[N, K]`, in units of `unit`, its columns in the order of the weight.
        fit: of `unit * target`; its scales count as they will be stored.
        unit: a power of two.
        hessian: prepared in the order of the columns of `target`. Columns without input do not count.

    Yields:
        float64 `[n]`, of at most `CHUNK` rows, from the first to the last.
    """
    stored = {
        name: store_scale(value, sums=name == "row_scale" and not fit.layout.is_planes).to(torch.float32)
        for name in ("row_scale", "col_scale", "salient_col_scale")
        if (value := getattr(fit, name)) is not None
    }
    stored["row_scale"] = stored["row_scale"] / unit
    for start in range(0, len(target), CHUNK):
        rows = slice(start, start + CHUNK)
        part = replace(
            fit,
            row_scale=stored["row_scale"][rows],
            col_scale=stored.get("col_scale"),
            salient_col_scale=stored.get("salient_col_scale"),
            signs=fit.signs[:, rows],
            salient_signs=None if fit.salient_signs is None else fit.salient_signs[:, rows],
        )
        error = target[rows] - part.dequantize()
        if hessian is not None:
            error = product(torch.where(hessian.dead, 0.0, error), hessian.factor)
        yield error.square().sum(1, dtype=torch.float64)


def as_rounded(target: torch.Tensor, fit: BinarizedWeight, unit: float) -> BinarizedWeight:
    """Round-to-nearest of `unit * target` in the layout, the blocks and the salient columns of another fit."""
    bits, scale = round_to_nearest(target, fit.block_size)
    row_scale = torch.zeros_like(fit.row_scale)
    for term in fit.layout.terms:
        # with all planes equal, the terms of one zone add up to the first plane times this
        if term.planes == (0,):
            row_scale[..., term.row] = scale * unit
    return replace(
        fit,
        signs=bits.expand_as(fit.signs).clone(),
        row_scale=row_scale,
        col_scale=None if fit.col_scale is None else torch.ones_like(fit.col_scale),
        salient_col_scale=None if fit.salient_col_scale is None else torch.ones_like(fit.salient_col_scale),
    )


def no_worse_than_rounding(
    target: torch.Tensor, fit: BinarizedWeight, unit: float, hessian: PreparedHessian | None
) -> BinarizedWeight:
    """The fit, with round-to-nearest in the place of what that meets better: rows, or, where column scales tie the rows
    together, the whole weight. Nothing that is better changes by a bit.

    Args:
        target, fit, unit, hessian: as in `row_errors`.
    """
    rounded = as_rounded(target, fit, unit)
    lost = torch.cat(list(row_errors(target, fit, unit, hessian)))
    if fit.layout.col_scales:
        whole = float(lost.sum())
        # as many rows as it takes: a quarter of them where round-to-nearest has four times the error
        return fit if any(whole <= bound for bound in accumulate(_sums(target, rounded, unit, hessian))) else rounded
    bound = torch.cat(list(row_errors(target, rounded, unit, hessian)))
    worse = ~(lost <= bound)
    if not worse.any():
        return fit
    return replace(
        fit,
        signs=torch.where(worse[:, None], rounded.signs, fit.signs),
        row_scale=torch.where(worse[:, None, None], rounded.row_scale, fit.row_scale),
    )


def _sums(target: torch.Tensor, fit: BinarizedWeight, unit: float, hessian: PreparedHessian | None) -> Iterator[float]:
    return (float(errors.sum()) for errors in row_errors(target, fit, unit, hessian))


def rounding_is_better(
    target: torch.Tensor,
    reconstruction: torch.Tensor,
    block_size: int,
    hessian: torch.Tensor | None,
    damp_percent: float,
    shrinkage: float = 0.0,
) -> bool:
    """Whether round-to-nearest has less error than a fit that is no sum of sign planes over the same columns.

    What the rounding of stored scales can make of either error does not count.

    Args:
        target: float32 `[N, K]`.
        reconstruction: float32 `[N, K]`, what the fit stands for.
        block_size: of round-to-nearest.
        hessian: `X^T X`, `[K, K]`, None to measure the weights; damped by `damp_percent` and `shrinkage` as in
            `prepare_hessian`.
    """
    if hessian is None:
        metric = None
    else:
        metric = damped_hessian(hessian, damp_percent, shrinkage)
        target = torch.where(metric.diagonal() > 0, target, 0.0)  # as every method has it

    def size(part: torch.Tensor) -> float:
        return float((part * (part if metric is None else part @ metric)).sum(dtype=torch.float64))

    bits, scale = round_to_nearest(target, block_size)
    width = target.shape[1] if block_size == -1 else block_size
    scale = scale.repeat_interleave(width, 1)[:, : target.shape[1]]
    lost, bound = size(target - reconstruction), size(target - torch.where(bits, scale, -scale))
    total = size(target)
    return not lost <= bound + 2e-3 * math.sqrt(max(bound, 0.0) * total) + 1e-6 * total
