"""arb-dbf: a weight as the product of two scaled sign matrices, fitted under the calibration matrix.

`Q = diag(a) A diag(m) B diag(b)`, A in {-1, +1}^[N, r], B in {-1, +1}^[r, K], minimizes `tr((W - Q) H (W - Q)^T)`. The
form is the double binary factorization of Boza and Macko ("Addition is almost all you need: compressing neural networks
with double binary factorization", 2025); they fit it under the diagonal of H. Here the alternating direction method of
multipliers (ADMM) works under all of H, and descent on signs and scales follows (`factor_descent`).

ADMM keeps a real factor X beside each factor Z of the wanted form (sign times rank-one magnitude), and a running sum U
of their differences. In a round, with H and the columns of the other factor scaled to a unit diagonal:

    A:  X = (W H B^T + rho (Z - U)) (B H B^T + (rho + c) I)^-1          one r x r system
    B:  A^T A X H + (rho + c) X = A^T W H + rho (Z - U)                 conjugate gradients in the eigenbasis of H
    both:  Z = sign(X + U) * rank-one approximation of |X + U|,   U += X - Z

rho rises linearly, so that the factors are free at first and binary in the end. Held-out output error, mean of 14
matrices of SmolLM2-135M at 1.18 bits a weight: .0889 after 40 rounds, .0837 after 100. A larger rho (1.0, 1.5: .0844,
.0868), over-relaxation by 1.5 (.0881) and another regularization of the ramp (.0843, .0848) are worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..format.factors import FactorizedWeight
from ..spare_threads import product
from .cuda_graph import Replayed
from .factor_descent import Factors, descend, finish_scales
from .shared_work import once

RHO = 0.6
REGULARIZATION = 0.03
# Conjugate gradients start from the last round's solution. Held-out output error after 40 rounds, with 2, 4 and 8
# steps: .0825, .0790 (8 matrices); .0894, .0889 (14). Two are too few for the down projections, whose inputs are
# dominated by few directions.
STEPS = 5
# Rounds at the end in which rho no longer rises.
SETTLED = 3
# Of the descent after ADMM. It lowers the error by 4 to 8 % altogether, most of it in the first two passes.
DESCENTS = 2

Factor = torch.Tensor | float  # float32 `[]`


def binarize_factors(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    rank: int,
    damp_percent: float,
    num_iterations: int,
    seed: int,
) -> FactorizedWeight:
    """Fits the factors of one weight.

    Args:
        weight: float32 `[N, K]`, finite.
        hessian: `[K, K]`, `X^T X` at any positive scale; None counts the error of the weights themselves.
        rank: r, at least 1, of any size.
        damp_percent: added to the diagonal of the calibration matrix, as a fraction of its mean.
        num_iterations: rounds of ADMM.
        seed: of the signs of B at the start.

    Returns:
        The factors, scales in float32.

    Raises:
        ValueError: the calibration matrix has NaN or Inf.
    """
    problem = _Problem(weight, hessian, damp_percent)
    factors = _admm(problem, rank, num_iterations, seed)
    for _ in range(DESCENTS):
        descend(problem.weight, problem.hessian, factors)
    finish_scales(problem.weight, problem.hessian, factors)
    return FactorizedWeight(
        factors.outer > 0, factors.inner > 0, factors.row * problem.unit, factors.rank, factors.col / problem.spread
    )


class _Problem:
    """The weight and the calibration matrix, brought to the unit diagonal under which the rounds work.

    Attributes:
        weight: float32 `[N, K]`, columns times `spread`, over `unit`.
        hessian: float32 `[K, K]`, damped, of unit diagonal.
        spread: float32 `[K]`, the square root of the damped diagonal.
        unit: root mean square of the spread weight, 1 for a weight of zeros.
        values, basis: eigenvalues `[K]` and eigenvectors `[K, K]` of `hessian`; without a calibration matrix the basis
            is None and stands for the identity.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor | None, damp_percent: float):
        columns = weight.shape[1]
        self.basis: torch.Tensor | None = None
        if hessian is None:
            self.hessian = torch.eye(columns, device=weight.device)
            self.spread = self.values = torch.ones(columns, device=weight.device)
        else:
            damping = max(damp_percent, 1e-6)
            found = once(hessian, damping, lambda: _of_unit_diagonal(hessian, damping))
            self.hessian, self.spread, self.values, self.basis = found
        spread_weight = weight * self.spread
        unit = spread_weight.square().mean().sqrt()
        self.unit = torch.where(unit > 0, unit, 1.0)
        self.weight = spread_weight / self.unit

    def to_basis(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.basis is None else product(x, self.basis)

    def from_basis(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.basis is None else product(x, self.basis.T)


def _of_unit_diagonal(
    hessian: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`hessian`, `spread`, `values` and `basis` of `_Problem`."""
    if not torch.isfinite(hessian).all():
        raise ValueError("the calibration matrix has NaN or Inf: the layer's inputs overflowed")
    full = hessian.double()
    mean = full.diagonal().mean()
    full = full / torch.where(mean > 0, mean, 1.0)
    full = full + damping * torch.eye(len(full), dtype=torch.float64, device=full.device)
    spread = full.diagonal().sqrt()
    scaled = (full / (spread[:, None] * spread)).float()
    values, basis = torch.linalg.eigh(scaled)
    return scaled, spread.float(), values.clamp_min(0), basis


@dataclass
class _Split:
    """One factor: its binary form Z = `signs * left right^T`, which is also `value`, and the multipliers U."""

    signs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    multipliers: torch.Tensor
    value: torch.Tensor

    @classmethod
    def zero(cls, rows: int, columns: int, device: torch.device) -> _Split:
        ones, zeros = torch.ones(rows, columns, device=device), torch.zeros(rows, columns, device=device)
        # the first vector of the power iteration, and magnitudes of zero
        return cls(ones, torch.ones_like(ones[:, 0]), zeros[0].clone(), zeros, zeros.clone())

    def pull(self) -> torch.Tensor:
        """Z - U."""
        return self.value - self.multipliers

    def update(self, solution: torch.Tensor) -> None:
        """Z and U of a new X. In place, since new tensors of this size take as long as the arithmetic on a CPU."""
        free = self.multipliers.add_(solution)
        size = torch.abs(free, out=self.value)
        for _ in range(3):  # the best rank-one approximation, by power iteration from the last one
            right = self.left @ size
            torch.div(right, right.norm().clamp_min(1e-30), out=self.right)
            torch.mv(size, self.right, out=self.left)
        self.signs.fill_(1.0).copysign_(free)
        torch.mul(self.signs, self.left[:, None], out=self.value).mul_(self.right)
        self.multipliers.sub_(self.value)


def _admm(problem: _Problem, rank: int, rounds: int, seed: int) -> Factors:
    state = _Rounds(problem, rank, seed)
    run = Replayed(state.run, problem.weight.device)
    for round_ in range(rounds):
        state.set_rho(RHO * min(1.0, (round_ + 1) / max(rounds - SETTLED, 1)))
        run()
    return state.factors()


class _Rounds:
    """ADMM, a round at a time, on tensors that stay where they are."""

    def __init__(self, problem: _Problem, rank: int, seed: int):
        rows, columns = problem.weight.shape
        device = problem.weight.device
        self._problem = problem
        self._weighted = problem.weight @ problem.hessian
        # on the CPU, so that a seed means the same signs on every device
        generator = torch.Generator().manual_seed(seed)
        self._inner = torch.where(torch.rand(rank, columns, generator=generator) < 0.5, -1.0, 1.0).to(device)
        self._outer_split = _Split.zero(rows, rank, device)
        self._inner_split = _Split.zero(rank, columns, device)
        self._solution = torch.zeros_like(self._inner)  # of the inner factor, in the eigenbasis
        self._of_outer, self._of_inner = torch.ones(rank, device=device), torch.ones(rank, device=device)
        # tensors where they are replayed, of which the values change
        self._rho: Factor = torch.zeros((), device=device) if device.type == "cuda" else 0.0
        self._shift: Factor = torch.zeros((), device=device) if device.type == "cuda" else 0.0

    def set_rho(self, rho: float) -> None:
        """Of the rounds that follow."""
        if isinstance(self._rho, torch.Tensor) and isinstance(self._shift, torch.Tensor):
            self._rho.fill_(rho)
            self._shift.fill_(rho + REGULARIZATION)
        else:
            self._rho, self._shift = rho, rho + REGULARIZATION

    def run(self) -> None:
        """A round."""
        problem, outer_split, inner_split = self._problem, self._outer_split, self._inner_split

        pushed = product(self._inner, problem.hessian)
        gram, of_outer = _unit_diagonal(product(pushed, self._inner.T))
        self._of_outer.copy_(of_outer)
        gram.diagonal().add_(self._shift)
        pull = _add(product(problem.weight, pushed.T).div_(of_outer), outer_split.pull(), self._rho)
        outer_split.update(_solve(gram, pull))
        outer = outer_split.value / of_outer

        gram, of_inner = _unit_diagonal(product(outer.T, outer))
        self._of_inner.copy_(of_inner)
        pull = _add(product(outer.T, self._weighted).div_(of_inner[:, None]), inner_split.pull(), self._rho)
        _sylvester(gram, problem.values, self._shift, problem.to_basis(pull), self._solution)
        inner_split.update(problem.from_basis(self._solution))
        torch.div(inner_split.value, of_inner[:, None], out=self._inner)

    def factors(self) -> Factors:
        """What the rounds have come to."""
        outer, inner = self._outer_split, self._inner_split
        rank = outer.right / self._of_outer * inner.left / self._of_inner
        return Factors(outer.signs, inner.signs, outer.left, rank, inner.right)


def _add(total: torch.Tensor, other: torch.Tensor, factor: Factor) -> torch.Tensor:
    """In place, `total + factor * other`."""
    if isinstance(factor, torch.Tensor):
        return total.addcmul_(other, factor)
    return total.add_(other, alpha=factor)


def _unit_diagonal(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram matrix scaled to a unit diagonal, and the square root of its diagonal (1 where it is zero)."""
    size = gram.diagonal().clamp_min(0).sqrt()
    # a column of the other factor that vanished keeps a row of zeros: the shift alone decides about it
    size = torch.where(size > 1e-12 * size.max().clamp_min(1e-30), size, 1.0)
    return gram / (size[:, None] * size), size


def _solve(gram: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """`X gram = pull`, positive definite by its shift."""
    lower = torch.linalg.cholesky_ex(gram).L
    return _by_triangles(lower, pull) if gram.is_cuda else torch.cholesky_solve(pull.T, lower).T


def _by_triangles(lower: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """`X lower lower^T = pull`, two triangular systems.

    On a GPU `cholesky_solve` takes cuSOLVER's own workspaces, and where CUBLAS_WORKSPACE_CONFIG is set, as it has to be
    for torch's deterministic algorithms, its bits depended on the stream (384 rows, rank 152): the fits on streams
    beside each other, or recorded as a graph, came out otherwise than alone. These take torch's workspaces.
    """
    half = torch.linalg.solve_triangular(lower, pull.T, upper=False)
    return torch.linalg.solve_triangular(lower.T, half, upper=True).T


def _sylvester(
    gram: torch.Tensor, values: torch.Tensor, shift: Factor, pull: torch.Tensor, solution: torch.Tensor
) -> None:
    """`gram X diag(values) + shift X = pull` by conjugate gradients; float32 `[r, K]`.

    The preconditioner is the inverse of the diagonal, `values + shift`: that of `gram` is 1. An exact solution would
    need the eigenvectors of `gram` in every round, for the same result (.0790 and .0790 of 8 matrices).

    Args:
        pull: becomes what the solution lacks.
        solution: where it starts, and what it comes to.
    """
    diagonal = values + shift
    residual = pull.sub_(_add(product(gram, solution).mul_(values), solution, shift))
    scaled = residual / diagonal
    direction = scaled.clone()
    energy = _dot(residual, scaled)
    for _ in range(STEPS):
        image = _add(product(gram, direction).mul_(values), direction, shift)
        length = energy / _dot(direction, image).clamp_min(1e-30)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        torch.div(residual, diagonal, out=scaled)
        following = _dot(residual, scaled)
        direction.mul_(following / energy.clamp_min(1e-30)).add_(scaled)
        energy = following


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.dot(left.flatten(), right.flatten())
