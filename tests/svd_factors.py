"""The simplest fit of a product of two sign matrices, for tests that are not about the fit."""

from __future__ import annotations

import sys
import types

import torch

from optimum_arb import algorithms
from optimum_arb.format.factors import FactorizedWeight


def svd_factors(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    rank: int,
    damp_percent: float,
    num_iterations: int,
    seed: int,
) -> FactorizedWeight:
    """Signs of the singular vectors (repeated with random flips where the rank is larger than they are many), scales
    of the columns by their mean magnitude, then least squares for the rank's and the rows'."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    which = torch.arange(rank) % u.shape[1]
    flips = torch.where(torch.rand(rank, weight.shape[1], generator=generator) < 0.2, -1.0, 1.0)
    flips[: u.shape[1]] = 1.0
    outer = torch.where(u[:, which] >= 0, 1.0, -1.0)
    inner = torch.where(v[which] * flips >= 0, 1.0, -1.0)
    col = weight.abs().mean(0).clamp(min=1e-6)
    right = inner * col
    gram = (outer.T @ outer) * (right @ right.T) + 1e-3 * torch.eye(rank)
    middle = torch.linalg.solve(gram, ((outer.T @ weight) * right).sum(1))
    product = (outer * middle) @ right
    row = (product * weight).sum(1) / product.square().sum(1).clamp(min=1e-12)
    return FactorizedWeight(outer > 0, inner > 0, row, middle, col)


def install(monkeypatch) -> None:
    """Puts it in the place of the real fit, with no look at what round-to-nearest would do better."""
    monkeypatch.setattr(algorithms, "rounding_is_better", lambda *_: False)
    module = types.ModuleType("optimum_arb.algorithms.dbf")
    module.binarize_factors = svd_factors
    monkeypatch.setitem(sys.modules, module.__name__, module)
