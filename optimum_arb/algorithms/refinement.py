"""Descent of a whole weight under the full calibration matrix: block after block, the others fixed."""

from __future__ import annotations

from functools import partial

import torch

from ..spare_threads import product
from .cuda_graph import Replayed
from .hessian import PreparedHessian
from .planes import Descent, PlanesFit, Rounding


def refine_blocks(
    weight: torch.Tensor,
    hessian: PreparedHessian,
    block_size: int,
    fits: list[PlanesFit],
    sweeps: int,
    col_scale: bool = True,
    rounding: Rounding | None = None,
) -> None:
    """Fits each block again, the others fixed, in place; the objective `tr(E H E^T)` never rises.

    As a function of block b alone the objective is `tr((T - Q_b) H_bb (T - Q_b)^T)` and a constant, whose gradient
    `(T - Q_b) H_bb` is `(E H)_b`: the same form as the first fit, now knowing what the other blocks did. A block whose
    fit does not improve, by the rounding of its scales, stays as it is.

    Args:
        weight: float32 `[N, K]`, the weight itself, columns in the order of `hessian`.
        hessian: the prepared calibration matrix; the damped one counts.
        block_size: columns of a block.
        fits: the fits of the blocks.
        sweeps: passes over all blocks.
        col_scale: whether the fits have column scales.
        rounding: of the scales; None rounds to float16.
    """
    columns = weight.shape[1]
    matrix = hessian.damped
    error = weight - torch.cat([fit.reconstruction() for fit in fits], 1)
    replayed: dict[int, _ReplayedBlock] = {}  # by the width of the block: the last one may be narrower

    for _ in range(sweeps):
        for index, start in enumerate(range(0, columns, block_size)):
            here = slice(start, min(start + block_size, columns))
            metric, gradient, fit = matrix[here, here], product(error, matrix[:, here]), fits[index]
            if weight.is_cuda:
                width = here.stop - start
                if width not in replayed:
                    replayed[width] = _ReplayedBlock(metric, gradient, fit, col_scale, rounding)
                fits[index], change = replayed[width].improve(metric, gradient, fit)
            else:
                fits[index], change = _improve(metric, gradient, fit, col_scale, rounding)
            error[:, here] -= change


class _ReplayedBlock:
    """`_improve` of blocks of one shape on a GPU, by tensors that stay where they are; arguments as there."""

    def __init__(
        self,
        metric: torch.Tensor,
        gradient: torch.Tensor,
        before: PlanesFit,
        col_scale: bool,
        rounding: Rounding | None,
    ):
        self._metric, self._gradient, self._change = (
            torch.empty_like(each, memory_format=torch.contiguous_format) for each in (metric, gradient, gradient)
        )
        self._fit = before.copy()
        tensors = self._metric, self._gradient, self._change
        self._run = Replayed(partial(_improve_in_place, *tensors, self._fit, col_scale, rounding), gradient.device)

    def improve(
        self, metric: torch.Tensor, gradient: torch.Tensor, before: PlanesFit
    ) -> tuple[PlanesFit, torch.Tensor]:
        """What `_improve` returns; the next call overwrites the change."""
        self._metric.copy_(metric)
        self._gradient.copy_(gradient)
        self._fit.assign(before)
        self._run()
        return self._fit.copy(), self._change


def _improve_in_place(
    metric: torch.Tensor,
    gradient: torch.Tensor,
    change: torch.Tensor,
    fit: PlanesFit,
    col_scale: bool,
    rounding: Rounding | None,
) -> None:
    # Not a method: a cycle of references kept a graph's memory until Python looked for one, 1.5 GB a layer of a 7B.
    better, changed = _improve(metric, gradient, fit, col_scale, rounding)
    fit.assign(better)
    change.copy_(changed)


def _improve(
    metric: torch.Tensor, gradient: torch.Tensor, before: PlanesFit, col_scale: bool, rounding: Rounding | None
) -> tuple[PlanesFit, torch.Tensor]:
    """One block: its fit and the change of Q `[N, k]`; no change where the objective would not fall.

    Args:
        metric: `H_bb`, float32 `[k, k]`.
        gradient: `(E H)_b`, float32 `[N, k]`.
        before: the fit so far.
        col_scale, rounding: as in `refine_blocks`.
    """
    after = before.copy()
    descent = Descent(metric, after, gradient.clone())
    descent.scales(col_scale)
    descent.signs()
    descent.finish(col_scale, rounding)
    change = after.reconstruction() - before.reconstruction()
    # the objective's change is -2 <change, gradient> + <change H_bb, change>, and the gradient that the steps left is
    # the first one less change H_bb; a GPU is not asked for the outcome
    better = (change * (gradient + descent.gradient)).sum(dtype=torch.float64) > 0
    if better.device.type == "cpu":  # where there is nothing to wait for
        return (after, change) if better else (before, torch.zeros_like(change))
    fit = PlanesFit(
        torch.where(better, after.signs, before.signs),
        torch.where(better, after.row, before.row),
        torch.where(better, after.col, before.col),
    )
    return fit, torch.where(better, change, 0.0)
