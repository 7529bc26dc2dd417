"""Sign planes of a whole weight at once, by the alternating direction method of multipliers (ADMM).

`Q = sum_p r_p c_p^T * B_p` shall minimize `tr((W - Q) H (W - Q)^T)`. With Z of that form, and X free, one iteration is

    X = argmin tr((W - X) H (W - X)^T) + rho ||X - Z + U||^2 = W - (W - Z + U) rho (H + rho I)^-1
    Z = the nearest weight of that form to X + U
    U = U + X - Z

(Boyd et al. 2011, section 9.1: the constraint set is not convex, so this is a search, not a descent; what follows it is
one.) It runs on columns scaled by `sqrt(H_jj)`, which the column scales take back, with rho rising from nearly 0: at
first X sees the loss alone. All blocks and all planes are fitted together, where the block loop fits a block before it
knows the next one.
"""

from __future__ import annotations

from functools import partial

import torch

from ..spare_threads import ahead
from .cuda_graph import Replayed
from .planes import PlanesFit
from .products import MIXED, product_float32
from .shared_work import Part, also_elsewhere
from .sign_terms import SignTerms

# The highest rho, for a matrix H of unit diagonal. Mean of 5 matrices of SmolLM2-135M, one plane, held-out output error
# after 16 iterations and 2 sweeps: .1374 at .3, .1206 at .5, .1214 at .8, .1242 at 1.2.
HIGHEST_RHO = 0.6
# Values of rho, each of which costs an inverse of H + rho I, about as much as two iterations. 25 iterations come to
# .1186 with 5, 20 to .1193 with 5 and .1191 with 10.
STAGES = 5
# Rows of a triangular system that is solved at once on a GPU; above, products are faster.
LARGEST_SOLVE = 1024
# Weights whose iterations are replayed on a GPU. Those of a 7B are larger, and keep it busy by themselves.
MOST_REPLAYED = 1 << 22


def admm_planes(
    weight: torch.Tensor, matrix: torch.Tensor, block_size: int, planes: int, iterations: int, col_scale: bool = True
) -> list[PlanesFit]:
    """Sign planes, row and column scales of all blocks.

    Args:
        weight: float32 `[N, K]`.
        matrix: float32 `[K, K]`, the calibration matrix, damped: positive definite.
        block_size: columns that share a row scale; the last block holds what is left.
        planes: P.
        iterations: iterations in all, shared out to at most `STAGES` values of rho.
        col_scale: whether there are column scales; without, they are 1, and columns are not scaled beforehand.

    Returns:
        The fits of the blocks, scales as they came out, neither exact for the signs nor rounded.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1.")
    size = _column_sizes(matrix, col_scale)
    dtype = product_dtype(weight.device)
    terms = SignTerms(weight * size, block_size, planes, col_scale, dtype)
    stages = pull_parts(matrix, iterations, col_scale)
    pulls = torch.empty_like(matrix, dtype=dtype) if _replays(weight) else None

    def iterate() -> None:
        terms.leave()
        terms.add_product(pull if pulls is None else pulls)
        terms.project()

    run = iterate if pulls is None else Replayed(iterate, weight.device)
    for stage, pull in enumerate(ahead(also_elsewhere(Part.once), stages)):
        if pulls is not None:
            pulls.copy_(pull)
        for _ in range((stage + 1) * iterations // len(stages) - stage * iterations // len(stages)):
            run()
    return terms.fits(size)


def pull_parts(matrix: torch.Tensor, iterations: int, col_scale: bool = True) -> list[Part[torch.Tensor]]:
    """`rho (H + rho I)^-1`, `[K, K]` in `product_dtype`, of each value of rho in its turn; none looks at the weight.

    Args:
        matrix, iterations, col_scale: as in `admm_planes`.
    """
    stages = min(STAGES, iterations)
    every = [HIGHEST_RHO * (stage + 1) / stages for stage in range(stages)]
    return [Part(matrix, (rho, col_scale), partial(_pull, matrix, rho, col_scale)) for rho in every]


def _pull(matrix: torch.Tensor, rho: float, col_scale: bool) -> torch.Tensor:
    size = _column_sizes(matrix, col_scale)
    shifted = matrix / (size[:, None] * size)
    shifted.diagonal().add_(rho)
    return _inverse(shifted).mul_(rho).to(product_dtype(matrix.device))


def _column_sizes(matrix: torch.Tensor, col_scale: bool) -> torch.Tensor:
    return matrix.diagonal().sqrt() if col_scale else matrix.diagonal().mean().sqrt().expand(len(matrix))


def _replays(weight: torch.Tensor) -> bool:
    return weight.is_cuda and weight.numel() <= MOST_REPLAYED


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of a positive definite float32 `[K, K]`.

    On a GPU `cholesky_inverse` solves for all columns of the identity twice: at 11008, on an H200, 71 ms where the
    factorization takes 17; so the triangular factor is inverted there, by products of its parts.
    """
    lower = torch.linalg.cholesky_ex(matrix)[0]
    if not matrix.is_cuda:
        return torch.cholesky_inverse(lower)
    inverse = _triangular_inverse(lower).to(product_dtype(matrix.device))
    return inverse.T @ inverse if inverse.dtype == lower.dtype else product_float32(inverse.T, inverse)


def _triangular_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Of a lower triangular `[K, K]`: `[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]`."""
    size = len(lower)
    if size <= LARGEST_SOLVE:
        return torch.linalg.solve_triangular(lower, torch.eye(size, device=lower.device), upper=False)
    half = -(-size // 128) * 64
    first, second = _triangular_inverse(lower[:half, :half]), _triangular_inverse(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = second @ (lower[half:, :half] @ first).neg_()
    return inverse


def product_dtype(device: torch.device) -> torch.dtype:
    """Of the products of an iteration: bfloat16 on a GPU, for its tensor cores, and on a CPU with AMX, where that takes
    a sixth of the time ([576, 1536] by [1536, 1536] on one core: 3 and 20 ms). Output error after refinement, over that
    with float32, on a CPU: 1.0004 with one plane, the mean of 12 matrices of SmolLM2-135M (.999 to 1.002), 1.0005 with
    two, of 9 (.998 to 1.003)."""
    if device.type == "cuda":
        return torch.bfloat16 if MIXED else torch.float32
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if device.type == "cpu" and amx is not None and amx() and torch.backends.mkldnn.is_available():
        return torch.bfloat16
    return torch.float32
