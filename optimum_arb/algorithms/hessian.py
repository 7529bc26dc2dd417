"""The calibration matrix `H = X^T X`: dead columns, damping, order of columns, and its factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..spare_threads import product


@dataclass
class PreparedHessian:
    """A calibration matrix made ready for the block loop.

    Attributes:
        matrix: float32 `[K, K]`, undamped, columns permuted; zero where no input was ever seen.
        inverse_factor: float32 `[K, K]`, the upper triangular U with `H^-1 = U^T U`, H damped (GPTQ, arXiv
            2210.17323); `[0, 0]` where it was not asked for.
        factor: float32 `[K, K]`, its inverse `R = U^-1`, upper triangular, `H = R R^T`.
        dead: bool `[K]`, columns whose input was always zero.
        permutation: int64 `[K]`: column j here is column `permutation[j]` of the weight; None without activation
            order.
    """

    matrix: torch.Tensor
    inverse_factor: torch.Tensor
    factor: torch.Tensor
    dead: torch.Tensor
    permutation: torch.Tensor | None

    @cached_property
    def damped(self) -> torch.Tensor:
        """H, damped, float32 `[K, K]`."""
        return product(self.factor, self.factor.T)

    def block_metric(self, start: int, stop: int) -> torch.Tensor:
        """`M = (U_bb^T U_bb)^-1`, the Schur complement of the later columns: the metric of a block's error while
        later columns can still make up for it, `min over later columns of tr(E H E^T) = tr(E_b M E_b^T)`. float32
        `[k, k]`."""
        factor = self.factor[start:stop, start:stop]
        return factor @ factor.T


def prepare_hessian(
    hessian: torch.Tensor, damp_percent: float, act_order: bool, shrinkage: float = 0.0, inverse: bool = True
) -> PreparedHessian:
    """Shrinks, damps and factorizes a calibration matrix.

    Columns without any input get a diagonal of 1, as in GPTQ, so that nothing is compensated through them. The
    factorization runs in float64 and is tried again with ten times the damping where the matrix is not positive
    definite.

    Args:
        hessian: `[K, K]`, `X^T X` at any positive scale.
        damp_percent: added to the diagonal, as a fraction of its mean.
        act_order: permute the columns by falling diagonal (dead columns last).
        shrinkage: how much smaller the entries beside the diagonal are made, as a fraction of them (Ledoit and Wolf
            2004): those of few samples are larger than those of all text.
        inverse: whether the inverse factor is wanted, which takes longer than the factor: 93 of 230 ms at 1536 columns
            on a core of a Xeon.

    Raises:
        ValueError: the matrix has NaN or Inf, or cannot be made positive definite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the calibration matrix has NaN or Inf: the layer's inputs overflowed or were not finite")
    # each of these is float64 `[K, K]`, 970 MB for the down projection of a 7B: none is kept longer than it is needed
    full = _of_unit_mean(hessian)
    dead = full.diagonal() <= 0
    permutation = None
    if act_order:
        permutation = torch.argsort(full.diagonal(), descending=True, stable=True)
        full = full[permutation]
        full = full[:, permutation]
        dead = dead[permutation]
    matrix = full.float()
    damped = _shrink(full, dead, shrinkage)
    mean = damped.diagonal().mean()
    damping = max(damp_percent, 1e-8)
    for _ in range(7):
        # H = R R^T with R upper triangular is the Cholesky factorization of H read backwards
        attempt = damped.flip(0, 1)
        attempt.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(attempt)
        del attempt
        if not failed:
            factor = lower.flip(0, 1)
            del lower
            inverse_factor = _triangular_inverse(factor) if inverse else factor[:0, :0]
            if torch.isfinite(inverse_factor).all():
                return PreparedHessian(matrix, inverse_factor.float(), factor.float(), dead, permutation)
        damping *= 10
    raise ValueError(
        f"the calibration matrix cannot be factorized even with a damping of {damping / 10:g} times its mean "
        "diagonal: calibrate with more text or raise damp_percent"
    )


def _triangular_inverse(factor: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


def damped_hessian(hessian: torch.Tensor, damp_percent: float, shrinkage: float = 0.0) -> torch.Tensor:
    """The matrix that `prepare_hessian` factorizes, in the order of the columns, without its factors.

    Args:
        hessian, damp_percent, shrinkage: as there.

    Returns:
        float32 `[K, K]`, rows and columns of 0 where there never was an input.
    """
    full = _of_unit_mean(hessian)
    dead = full.diagonal() <= 0
    damped = _shrink(full, dead, shrinkage)
    damped.diagonal().add_(max(damp_percent, 1e-8) * damped.diagonal().mean())
    damped.diagonal()[dead] = 0.0
    return damped.float()


def _of_unit_mean(hessian: torch.Tensor) -> torch.Tensor:
    """A float64 copy over the mean of its diagonal: a common scale, so that one damping and one ridge serve inputs of
    any size; 1e-30 and 1e30 both pass."""
    full = hessian.to(torch.float64, copy=True)
    mean = full.diagonal().mean()
    return full.div_(mean) if mean > 0 else full


def _shrink(full: torch.Tensor, dead: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """In place."""
    if shrinkage:
        diagonal = full.diagonal().clone()
        full *= 1 - shrinkage
        full.diagonal().copy_(diagonal)
    full.diagonal()[dead] = 1.0
    return full


def identity_hessian(columns: int, device: torch.device) -> PreparedHessian:
    """What stands for the calibration matrix where there is no calibration: the error of the weights themselves."""
    identity = torch.eye(columns, device=device)
    dead = torch.zeros(columns, dtype=torch.bool, device=device)
    return PreparedHessian(identity, identity, identity, dead, None)
