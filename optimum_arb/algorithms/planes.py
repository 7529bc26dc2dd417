"""The fit of arb-hrc: sign planes with row and column scales, least squares under the calibration matrix.

For one block of columns, `Q = sum_p r_p c_p^T * B_p` minimizes

    tr((W - Q) M (W - Q)^T)

where M is the metric of the block (`PreparedHessian.block_metric`). ARB-LLM updates row and column scales under the
plain squared error because the calibration matrix couples all column scales; but that coupled problem is a linear
least-squares problem of (planes * k) unknowns, and is solved here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .column_descent import descend_columns
from .normal_equations import solve


class Rounding(Protocol):
    """How scales are rounded to what is stored."""

    def row(self, scale: torch.Tensor) -> torch.Tensor:
        """Row scales float32 `[P, N]` to values that can be stored."""

    def col(self, scale: torch.Tensor) -> torch.Tensor:
        """Column scales float32 `[P, k]`, likewise."""


@dataclass
class PlanesFit:
    """P sign planes of a block of `[N, k]` weights.

    Attributes:
        signs: float `[P, N, k]`, +1 or -1.
        row: float `[P, N]`.
        col: float `[P, k]`.
    """

    signs: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor

    def reconstruction(self) -> torch.Tensor:
        """Q, float `[N, k]`."""
        return self.total(self.row[:, :, None] * self.col[:, None, :])

    def total(self, sizes: torch.Tensor) -> torch.Tensor:
        """The sum over the planes of `sizes * signs`, `sizes` of a shape that `[P, N, k]` fits; float `[N, k]`."""
        return _summed(self.signs * sizes)

    def copy(self) -> PlanesFit:
        """The same on tensors of its own."""
        return PlanesFit(self.signs.clone(), self.row.clone(), self.col.clone())

    def assign(self, other: PlanesFit) -> None:
        """Copies the values of another one of the same shapes into these tensors."""
        self.signs.copy_(other.signs)
        self.row.copy_(other.row)
        self.col.copy_(other.col)


def fit_planes(
    weight: torch.Tensor, factor: torch.Tensor, planes: int, rounds: int, col_scale: bool = True
) -> PlanesFit:
    """Alternates row scales, column scales and signs; ends with scales rounded to float16.

    The start is greedy, and with several planes its signs are then chosen anew in order. One plane keeps the greedy
    signs: SmolLM2-135M has a perplexity of 818 to 916 then (4 runs of slightly different damping) and 979 with signs
    in order.

    Args:
        weight: float32 `[N, k]`.
        factor: float32 `[k, k]`, upper triangular; the metric is `M = factor factor^T`.
        planes: P.
        rounds: rounds of rows, columns, signs. Held-out output error at two planes, mean of 8 matrices of
            SmolLM2-135M: .0432 after 1 round in order and 1 of descent, .0426 after 2 of descent, .0426 after 3.
        col_scale: whether there are column scales; without, they are 1 and stay so.
    """
    metric = factor @ factor.T
    fit = greedy_start(weight, planes, col_scale)
    if planes > 1:
        update_scales(weight, metric, fit, col_scale)
        signs_in_order(weight, factor, fit)
    descent = Descent.of(weight, metric, fit)
    for _ in range(rounds):
        descent.scales(col_scale)
        descent.signs()
    descent.finish(col_scale)
    return fit


def greedy_start(weight: torch.Tensor, planes: int, col_scale: bool = True) -> PlanesFit:
    """Plane by plane, the signs of the residual with rank-one scales of its size (three rounds of ARB-RC's updates);
    without column scales, with the mean size of each row."""
    residual = weight
    signs, rows, cols = [], [], []
    for _ in range(planes):
        size = residual.abs()
        col = torch.ones_like(size[0])
        for _ in range(3):
            row = _divide(size @ col, col.square().sum())
            if not col_scale:
                break
            col = _divide(row @ size, row.square().sum())
        bits = torch.where(residual >= 0, 1.0, -1.0)
        residual = residual - bits * row[:, None] * col
        signs.append(bits)
        rows.append(row)
        cols.append(col)
    return PlanesFit(torch.stack(signs), torch.stack(rows), torch.stack(cols))


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)


@dataclass
class Descent:
    """Steps on a fit, in place, none of which raises the objective. They share what each of them needs, the gradient.

    The gradient is carried in float32, so that no step can tell a rise below 1e-6 of `tr(W M W^T)`, which scales under
    one token and a damping of 1e-6 come close to: 8e-7 is the most that was seen, of an objective of 4e-6. To measure
    each step exactly would take the product of the whole error with M in float64.

    Attributes:
        metric: M, float32 `[k, k]`.
        fit: what the steps change.
        gradient: `(W - Q) M`, float32 `[N, k]`: half the objective's negative gradient by Q. Every step keeps it.
    """

    metric: torch.Tensor
    fit: PlanesFit
    gradient: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, metric: torch.Tensor, fit: PlanesFit) -> Descent:
        """The steps of a fit of `weight`, float32 `[N, k]`."""
        return cls(metric, fit, (weight - fit.reconstruction()) @ metric)

    def scales(self, col_scale: bool = True) -> None:
        """Row scales, then column scales where there are any."""
        self.rows()
        if col_scale:
            self.columns()

    def rows(self) -> None:
        """Per row `(A M A^T) r = A M w`, `A = [c_p * b_p]`, a P x P system."""
        fit = self.fit
        basis = fit.signs * fit.col[:, None, :]  # [P, N, k]
        weighted = basis @ self.metric
        if len(basis) == 1:
            normal = (weighted * basis).sum(2).T[..., None]
        else:
            normal = torch.stack([(weighted * plane).sum(2) for plane in basis], 2).permute(1, 0, 2)  # [N, P, P]
        slope = (basis * self.gradient).sum(2).T
        step = solve(normal.double(), slope.double()).T.to(fit.row.dtype)
        fit.row += step
        for plane, moved in zip(step, weighted, strict=True):
            self.gradient.addcmul_(plane[:, None], moved, value=-1)

    def columns(self) -> None:
        """One system over all columns and planes:

        `N[(p,j),(q,l)] = M_jl sum_n r_pn r_qn B_pnj B_qnl`,  right-hand side `sum_n r_pn B_pnj (W M)_nj`.
        """
        fit = self.fit
        planes, _, columns = fit.signs.shape
        basis = fit.signs * fit.row[:, :, None]
        slope = (basis * self.gradient).sum(1).flatten().double()
        every = basis.permute(1, 0, 2).flatten(1)  # [N, P k]
        if planes > 1:  # planes may be equal, and float32 would not keep what tells them apart
            every = every.double()
        normal = (every.T @ every).double() * self.metric.double().repeat(planes, planes)
        step = solve(normal[None], slope[None])[0].view(planes, columns).to(fit.col.dtype)
        fit.col += step
        self.gradient -= _summed(basis * step[:, None, :]) @ self.metric

    def signs(self) -> None:
        """Coordinate descent over the columns, all rows at once.

        For column j the best value given the rest is `t = Q_nj + ((W - Q) M)_nj / M_jj`; each weight takes the nearest
        of its 2^P levels, and the change is carried into (W - Q) M.
        """
        fit, metric = self.fit, self.metric
        current = fit.reconstruction().T.contiguous()
        # t - Q = gradient / M_jj, so that the loop only adds
        step = (self.gradient.T / metric.diagonal()[:, None]).contiguous()
        fit.signs, changes = descend_columns(current, step, fit.row, fit.col, metric / metric.diagonal())
        self.gradient.addmm_(changes.T, metric, alpha=-1)

    def finish(self, col_scale: bool = True, rounding: Rounding | None = None) -> None:
        """The last scales, as they are stored.

        Args:
            col_scale: whether there are column scales.
            rounding: of the scales; None rounds to float16.
        """
        fit = self.fit
        self.scales(col_scale)
        normalize(fit)
        # the rounding of the columns is made up for by the rows, and that of the rows by the columns that follow
        if col_scale:
            before = fit.col
            fit.col = before.half().float() if rounding is None else rounding.col(before)
            self.gradient -= fit.total(fit.row[:, :, None] * (fit.col - before)[:, None, :]) @ self.metric
            self.rows()
        before = fit.row
        fit.row = before.half().float() if rounding is None else rounding.row(before)
        self.gradient -= fit.total((fit.row - before)[:, :, None] * fit.col[:, None, :]) @ self.metric


def update_rows(weight: torch.Tensor, metric: torch.Tensor, fit: PlanesFit) -> None:
    """`Descent.rows` of a fit of `weight`, in place."""
    Descent.of(weight, metric, fit).rows()


def update_columns(weight: torch.Tensor, metric: torch.Tensor, fit: PlanesFit) -> None:
    """`Descent.columns` of a fit of `weight`, in place."""
    Descent.of(weight, metric, fit).columns()


def update_scales(weight: torch.Tensor, metric: torch.Tensor, fit: PlanesFit, col_scale: bool = True) -> None:
    """`Descent.scales` of a fit of `weight`, in place."""
    Descent.of(weight, metric, fit).scales(col_scale)


def update_signs(weight: torch.Tensor, metric: torch.Tensor, fit: PlanesFit) -> None:
    """`Descent.signs` of a fit of `weight`, in place."""
    Descent.of(weight, metric, fit).signs()


def _summed(planes: torch.Tensor) -> torch.Tensor:
    """The sum over the planes of `[P, N, k]`: a launch less where there is one."""
    return planes[0] if len(planes) == 1 else planes.sum(0)


def signs_in_order(weight: torch.Tensor, factor: torch.Tensor, fit: PlanesFit) -> None:
    """Signs column after column, each making up for the errors before it, in place (Babai's nearest plane).

    With `M = R R^T`, R upper triangular, the objective is `||(W - Q) R||^2`, and column j of `(W - Q) R` holds the
    errors of the columns up to j alone: the best value is `t = W_nj + sum_{i<j} E_ni R_ij / R_jj`. Unlike
    `update_signs` this looks at no sign that is still to be chosen, so it makes a better start than it is a step.

    Args:
        factor: R, float32 `[k, k]`.
    """
    original = weight.T.contiguous()
    ratio = factor / factor.diagonal()
    fit.signs, _ = descend_columns(original, torch.zeros_like(original), fit.row, fit.col, ratio)


def normalize(fit: PlanesFit) -> None:
    """Moves signs of the scales into the planes and the columns' mean size into the rows, in place, Q unchanged."""
    fit.signs = (
        fit.signs * torch.where(fit.row >= 0, 1.0, -1.0)[:, :, None] * torch.where(fit.col >= 0, 1.0, -1.0)[:, None, :]
    )
    fit.row, fit.col = fit.row.abs(), fit.col.abs()
    size = fit.col.mean(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    fit.col = fit.col / size
    fit.row = fit.row * size
