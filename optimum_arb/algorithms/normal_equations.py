"""The normal equations of a step on scales."""

from __future__ import annotations

import torch

# Relative to the mean diagonal of the normal equations: far below the float32 rounding of their entries, enough for
# planes that became equal. It pulls towards the current value, so a step can only lower the objective.
RIDGE = 1e-7


def solve(normal: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Batched `normal x = slope` with a ridge; 0 where that fails all the same.

    Args:
        normal, slope: float64 `[B, n, n]`, `[B, n]`.

    Returns:
        float64 `[B, n]`.
    """
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * (diagonal if normal.shape[-1] == 1 else diagonal.mean(-1, keepdim=True))
    ridge = torch.where(ridge > 0, ridge, 1.0)
    if normal.shape[-1] == 1:
        return torch.nan_to_num(slope / (normal[..., 0] + ridge), 0.0, 0.0, 0.0)
    if normal.is_cuda and len(normal) > 1:
        return torch.nan_to_num(_of_few(normal, slope, ridge), 0.0, 0.0, 0.0)
    lower, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge.expand_as(diagonal)))
    step = torch.cholesky_solve(slope[..., None], lower)[..., 0]
    return torch.where((failed != 0)[:, None], 0.0, torch.nan_to_num(step, 0.0, 0.0, 0.0))


def _of_few(normal: torch.Tensor, slope: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Batched `(normal + ridge I) x = slope` of a few unknowns by Cholesky's factorization, NaN where that fails.

    For a GPU, where torch's batched solver waits for the host, which no CUDA graph can record.

    Args:
        normal, slope: float64 `[N, P, P]`, `[N, P]`.
        ridge: `[N, 1]`.
    """
    size = normal.shape[-1]
    lower: list[list[torch.Tensor]] = []
    half: list[torch.Tensor] = []  # of the solution of `lower y = slope`
    for i in range(size):
        row: list[torch.Tensor] = []
        for j in range(i + 1):
            left = normal[:, i, j] + ridge[:, 0] if i == j else normal[:, i, j]
            for k in range(j):
                left = left - row[k] * (row[k] if i == j else lower[j][k])
            row.append(left.sqrt() if i == j else left / lower[j][j])
        lower.append(row)
        rest = slope[:, i]
        for k in range(i):
            rest = rest - row[k] * half[k]
        half.append(rest / row[i])
    step: list[torch.Tensor] = [torch.empty(0)] * size
    for i in reversed(range(size)):
        rest = half[i]
        for k in range(i + 1, size):
            rest = rest - lower[k][i] * step[k]
        step[i] = rest / lower[i][i]
    return torch.stack(step, 1)
