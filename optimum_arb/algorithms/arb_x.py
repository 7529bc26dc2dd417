"""ARB-X: mean and row scale refined under the calibration matrix (arXiv 2410.03129, Sec. 3.3)."""

from __future__ import annotations

import torch

from .arb import arb
from .residual import ZoneFit


def arb_x(weight: torch.Tensor, groups: torch.Tensor, order: int, num_iterations: int, metric: torch.Tensor) -> ZoneFit:
    """ARB, then with the signs frozen `num_iterations` rounds that minimize `||X (W - Q)^T||^2` of each group:

        mu    = 1^T S (W - alpha B)^T / (1^T S 1)
        alpha = diag(B S (W - mu)^T) / diag(B S B^T)          (order 2: a1, then a2, with the other's part taken off)

    where S is the block of `X^T X`, masked with the group. Products between two groups are left out, as in the paper.

    Args:
        weight: float `[N, k]`, a zone of columns.
        groups: float `[G, N, k]`, see `ZoneFit`.
        order: 1 or 2.
        num_iterations: rounds of each of the two refinements (15 in the paper).
        metric: S, float `[k, k]`, the undamped block of `X^T X` at these columns.
    """
    fit = arb(weight, groups, order, num_iterations)
    for _ in range(num_iterations):
        refine_under_metric(weight, fit, metric)
    return fit


def refine_under_metric(weight: torch.Tensor, fit: ZoneFit, metric: torch.Tensor) -> None:
    """One round of mu, then each alpha in turn, in place. A direction that the inputs never show stays as it is."""
    assert fit.mean is not None
    size = metric.abs()
    for g, mask in enumerate(fit.groups):
        # below this a length, a sum of both signs, is the rounding of zero: one token made a mean of 2,787 of it
        tiny = 1e-6 * ((mask @ size) * mask).sum(1)
        directions = [mask] + [torch.where(bits, mask, -mask) for bits in fit.signs]
        for index, direction in enumerate(directions):
            error = mask * (weight - fit.group_reconstruction(g))
            weighted = direction @ metric
            length = (weighted * direction).sum(1)
            step = torch.where(length > tiny, (weighted * error).sum(1) / torch.where(length > tiny, length, 1.0), 0.0)
            if index == 0:
                fit.mean[:, g] += step
            else:
                fit.scale[:, g, index - 1] += step
