"""Descent on the signs and scales of two factors: no step raises `tr((W - Q) H (W - Q)^T)`.

`Q = diag(row) outer diag(rank) inner diag(col)`. Each scale alone is a linear least-squares problem, and is solved. The
rows of the outer factor are independent of each other: its signs are flipped one column after the other in all rows at
once. The entries of the inner factor all depend on each other, by `outer^T outer` along its columns and by H along its
rows: many are flipped at once, those that would gain most alone, if that lowers the objective.

All of it is of float32: under one direction of inputs that outweighs all others, and a damping of 1e-6, a step of the
column scales raised an objective of 5e-6 of `tr(W H W^T)` by 1.5e-5 of it, the most that was seen in 1,000 fits. From a
damping of 1e-4 on nothing was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spare_threads import product
from .column_descent import descend_columns

# Relative to the mean diagonal of the normal equations; it pulls towards the current value, so no step can raise the
# objective.
RIDGE = 1e-7
# Attempts to flip signs of the inner factor. One after the other, column by column, descends as far in one pass as 20
# attempts in two, which take half its time on a CPU and a fiftieth on a GPU.
ATTEMPTS = 20


@dataclass
class Factors:
    """The factors of a weight `[N, K]`.

    Attributes:
        outer: float32 `[N, r]`, +1 or -1.
        inner: float32 `[r, K]`, +1 or -1.
        row: float32 `[N]`.
        rank: float32 `[r]`.
        col: float32 `[K]`.
    """

    outer: torch.Tensor
    inner: torch.Tensor
    row: torch.Tensor
    rank: torch.Tensor
    col: torch.Tensor

    def reconstruction(self) -> torch.Tensor:
        """Q, float32 `[N, K]`."""
        return (self.outer * self.row[:, None] * self.rank) @ (self.inner * self.col)


def descend(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """All scales, the signs of the outer factor, all scales, the signs of the inner factor; in place.

    Args:
        weight: float32 `[N, K]`.
        hessian: float32 `[K, K]`.
        factors: what is improved.
    """
    update_scales(weight, hessian, factors)
    flip_outer(weight, hessian, factors)
    update_row(weight, hessian, factors)
    flip_inner(weight, hessian, factors)


def update_scales(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """Rank, column and row scales in turn, in place."""
    update_rank(weight, hessian, factors)
    update_col(weight, hessian, factors)
    update_row(weight, hessian, factors)


def finish_scales(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """The last scales, in place."""
    update_scales(weight, hessian, factors)


def update_rank(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """`[(A0^T A0) * (B0 H B0^T)] m = diag(A0^T W H B0^T)`, A0 and B0 with their other scales."""
    outer, inner = factors.outer * factors.row[:, None], factors.inner * factors.col
    error = weight - (outer * factors.rank) @ inner
    pushed = inner @ hessian
    normal = (outer.T @ outer).double() * (pushed @ inner.T).double()
    slope = ((outer.T @ error) * pushed).sum(1, dtype=torch.float64)
    factors.rank = factors.rank + _step(normal, slope)


def update_col(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """`[(Y^T Y) * H] b = diag(Y^T W H)`, `Y = diag(a) A diag(m) B`."""
    product = (factors.outer * factors.row[:, None] * factors.rank) @ factors.inner
    error = weight - product * factors.col
    normal = (product.T @ product).double() * hessian.double()
    slope = (product * (error @ hessian)).sum(0, dtype=torch.float64)
    factors.col = factors.col + _step(normal, slope)


def update_row(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """Each row by itself: `a = <W, V>_H / <V, V>_H`, V the product without its row scales; 0 where V is."""
    product = (factors.outer * factors.rank) @ (factors.inner * factors.col)
    pushed = product @ hessian
    size = (pushed * product).sum(1, dtype=torch.float64)
    row = (pushed * weight).sum(1, dtype=torch.float64) / torch.where(size > 0, size, 1.0)
    factors.row = torch.where(size > 0, row, 0.0).to(weight.dtype)


def _step(normal: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The change of the scales, float32, from float64 normal equations; none where they cannot be solved."""
    mean = normal.diagonal().mean()
    normal.diagonal().add_(RIDGE * torch.where(mean > 0, mean, 1.0))
    lower, failed = torch.linalg.cholesky_ex(normal)
    step = torch.cholesky_solve(slope[:, None], lower)[:, 0]
    return torch.where((failed != 0) | ~torch.isfinite(step).all(), 0.0, step).float()


def flip_outer(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """One pass over the columns of the outer factor, in place.

    With `V = diag(rank) inner diag(col)`, `G = V H V^T` and `P = (W - Q) H V^T`, the best value of entry
    x = `row * outer` given the others is `x + P / G_jj`.
    """
    right = factors.rank[:, None] * factors.inner * factors.col
    pushed = right @ hessian
    gram = pushed @ right.T
    slope = (pushed @ (weight - (factors.outer * factors.row[:, None]) @ right).T).contiguous()  # [r, N]
    diagonal = gram.diagonal()
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)  # of a vanished row of the inner factor, whose slope is 0 too
    current = (factors.outer * factors.row[:, None]).T.contiguous()
    one = torch.ones_like(factors.rank)[None]
    signs, _ = descend_columns(current, slope / diagonal[:, None], factors.row[None], one, gram / diagonal)
    factors.outer = torch.where(factors.row[:, None] != 0, signs[0], factors.outer)


def flip_inner(weight: torch.Tensor, hessian: torch.Tensor, factors: Factors) -> None:
    """Attempts to flip many signs of the inner factor at once, in place.

    With `L = diag(row) outer diag(rank)`, `S = L^T L` and `P = L^T (W - Q) H`, turning entry x = `inner * col` round
    alone gains where `-P / x > S_ii H_jj`. An attempt flips all entries where it exceeds that by a margin, which widens
    after an attempt that would have raised the objective, and narrows after one that lowered it.
    """
    left = factors.outer * factors.row[:, None] * factors.rank
    gram = left.T @ left
    slope = product(left.T @ (weight - left @ (factors.inner * factors.col)), hessian)
    quadratic = gram.diagonal().clamp_min(0)[:, None] * hessian.diagonal()
    margin = torch.ones((), device=weight.device)
    for _ in range(ATTEMPTS):
        value = factors.inner * factors.col
        gain = torch.mul(value, slope).neg_().addcmul_(value.square().mul_(quadratic), 1 + margin, value=-1)
        chosen = gain.gt_(0)  # as numbers, since a choice by a mask is 10 times slower on a CPU
        change = value.mul_(chosen).mul_(-2)
        effect = product(product(gram, change), hessian)
        # no look at the numbers from here: on a GPU the host would wait in every attempt
        lowers = ((change * effect).sum(dtype=torch.float64) < 2 * (change * slope).sum(dtype=torch.float64)).float()
        factors.inner = factors.inner.addcmul(chosen.mul_(factors.inner), lowers, value=-2)
        slope.addcmul_(effect, lowers, value=-1)
        margin = torch.where(lowers > 0, margin * 0.7, margin * 2)
