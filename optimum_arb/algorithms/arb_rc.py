"""ARB-RC: row and column scales without a mean (arXiv 2410.03129, Sec. 3.4)."""

from __future__ import annotations

import torch

from .arb_rc_kernels import alternate, has_kernels
from .residual import ZoneFit, nearest_signs


def arb_rc(weight: torch.Tensor, groups: torch.Tensor, order: int, num_iterations: int) -> ZoneFit:
    """Minimizes `||W - Q||^2`, `Q = sum_o r_o c_o^T * B_o`, of each group by alternating closed forms.

    Start: r = mean_k |R|, c = mean_n |R / r|, B = sign(R), R the residual of the orders before. Then each round, for
    each order in turn, with W~ = W minus the other orders' parts:

        r = sum_k c B W~ / sum_k c^2;    c = sum_n r B W~ / sum_n r^2        (sums over the group's weights)

    and at order 2 (B1, B2) = the nearest of `+-r1 c1 +-r2 c2`. At order 1 the signs never change: sign(W) stays
    optimal. Each step is the minimum over its parameter with the others fixed, so the objective never rises.

    Args:
        weight: float `[N, k]`, a zone of columns.
        groups: float `[G, N, k]`, see `ZoneFit`.
        order: 1 or 2.
        num_iterations: rounds (15 in the paper).
    """
    fit = _start(weight, groups, order)
    if has_kernels(weight):
        alternate(weight, fit, num_iterations)
        return fit
    for _ in range(num_iterations):
        refine_rows_and_columns(weight, fit)
        if order > 1:
            refine_signs(weight, fit)
    return fit


def _start(weight: torch.Tensor, groups: torch.Tensor, order: int) -> ZoneFit:
    rows, columns = weight.shape
    in_row, in_column = groups.sum(2).clamp(min=1), groups.sum(1).clamp(min=1)  # [G, N], [G, k]
    fit = ZoneFit(
        signs=torch.empty(0, rows, columns, dtype=torch.bool, device=weight.device),
        scale=weight.new_zeros(rows, len(groups), order),
        mean=None,
        col_scale=weight.new_zeros(len(groups), order, columns),
        groups=groups,
    )
    assert fit.col_scale is not None
    for o in range(order):
        residual = weight - fit.reconstruction()
        row = (groups * residual.abs()).sum(2) / in_row
        ratio = residual.abs() / row[:, :, None].clamp(min=torch.finfo(weight.dtype).tiny)
        fit.scale[:, :, o] = row.T
        fit.col_scale[:, o] = (groups * torch.where(row[:, :, None] > 0, ratio, 0.0)).sum(1) / in_column
        fit.signs = torch.cat([fit.signs, (residual >= 0)[None]])
    return fit


def refine_rows_and_columns(weight: torch.Tensor, fit: ZoneFit) -> None:
    """One round of r and c of each order in turn, in place."""
    assert fit.col_scale is not None
    for g, mask in enumerate(fit.groups):
        for o, bits in enumerate(fit.signs):
            column = fit.col_scale[g, o]
            current = fit.scale[:, g, o, None] * column
            target = weight - fit.group_reconstruction(g)
            target = mask * (torch.where(bits, target, -target) + current)  # B W~
            fit.scale[:, g, o] = _ratio(target @ column, mask @ column.square())
            row = fit.scale[:, g, o]
            fit.col_scale[g, o] = _ratio(row @ target, row.square() @ mask)


def refine_signs(weight: torch.Tensor, fit: ZoneFit) -> None:
    """The nearest level of each weight's own group, in place."""
    per_weight = torch.einsum("gnk,ngo,gok->onk", fit.groups, fit.scale, fit.col_scale)
    fit.signs = nearest_signs(weight, list(per_weight))


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """0 for an empty sum."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(numerator.dtype).tiny), 0.0)
