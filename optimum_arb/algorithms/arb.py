"""ARB: alternating refined binarization of mean, row scale and signs (arXiv 2410.03129, Sec. 3.2)."""

from __future__ import annotations

import torch

from .residual import ZoneFit, nearest_signs, residual_binarization


def arb(weight: torch.Tensor, groups: torch.Tensor, order: int, num_iterations: int) -> ZoneFit:
    """Minimizes `||W - Q||^2` of each group, one parameter after the other, from the residual binarization.

    Order 1, `Q = mu + alpha B`:        mu += mean(W - Q);  alpha = mean(B (W - mu));  B = sign(W - mu).
    Order 2, `Q = mu + a1 B1 + a2 B2`:  mu as before;  a1 = mean(B1 (W - mu - a2 B2)), then a2 likewise with the new
    a1;  (B1, B2) = the nearest of the four levels `+-a1 +-a2`.

    Each step is the minimum over its parameter with the others fixed, so the objective never rises.

    Args:
        weight: float `[N, k]`, a zone of columns.
        groups: float `[G, N, k]`, see `ZoneFit`; the means are taken over a group's weights.
        order: 1 or 2.
        num_iterations: rounds (15 in the paper).
    """
    fit = residual_binarization(weight, groups, order)
    for _ in range(num_iterations):
        refine_mean_and_scales(weight, fit)
        refine_signs(weight, fit)
    return fit


def refine_mean_and_scales(weight: torch.Tensor, fit: ZoneFit) -> None:
    """One round of mu, then each alpha in turn, in place."""
    assert fit.mean is not None
    count = fit.groups.sum(2).clamp(min=1)
    for g, mask in enumerate(fit.groups):
        fit.mean[:, g] += (mask * (weight - fit.group_reconstruction(g))).sum(1) / count[g]
        for o, bits in enumerate(fit.signs):
            error = weight - fit.group_reconstruction(g)
            fit.scale[:, g, o] += (mask * torch.where(bits, error, -error)).sum(1) / count[g]


def refine_signs(weight: torch.Tensor, fit: ZoneFit) -> None:
    """The nearest level of each weight's own group, in place."""
    assert fit.mean is not None
    per_weight = torch.einsum("gnk,ngo->onk", fit.groups, fit.scale)
    mean = torch.einsum("gnk,ng->nk", fit.groups, fit.mean)
    fit.signs = nearest_signs(weight - mean, list(per_weight))
