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

import torch

from ..products import MIXED, product_float32
from .column_descent import sign_patterns
from .planes import PlanesFit

# The highest rho, for a matrix H of unit diagonal. Mean of 5 matrices of SmolLM2-135M, one plane, held-out output error
# after 16 iterations and 2 sweeps: .1374 at .3, .1206 at .5, .1214 at .8, .1242 at 1.2.
HIGHEST_RHO = 0.6
# Values of rho, each of which costs an inverse of H + rho I, about as much as two iterations. 25 iterations come to
# .1186 with 5, 20 to .1193 with 5 and .1191 with 10.
STAGES = 5
# Rows of a triangular system that is solved at once on a GPU; above, products are faster.
LARGEST_SOLVE = 1024


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
    size = matrix.diagonal().sqrt() if col_scale else matrix.diagonal().mean().sqrt().expand(len(matrix))
    target = weight * size
    matrix = matrix / (size[:, None] * size)
    terms = _Terms(target, block_size, planes, col_scale)
    near = terms.reconstruction()
    dual = torch.zeros_like(target)
    stages = min(STAGES, iterations)
    for stage in range(stages):
        rho = HIGHEST_RHO * (stage + 1) / stages
        shifted = matrix.clone()
        shifted.diagonal().add_(rho)
        pull = _rounded(_inverse(shifted).mul_(rho))
        for _ in range((stage + 1) * iterations // stages - stage * iterations // stages):
            free = _plus_product(target, near - target - dual, pull)
            dual += free
            near = terms.nearest(dual)
            dual -= near
    return terms.fits(size)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of a positive definite float32 `[K, K]`.

    On a GPU `cholesky_inverse` solves for all columns of the identity twice: at 11008, on an H200, 71 ms where the
    factorization takes 17; so the triangular factor is inverted there, by products of its parts.
    """
    lower = torch.linalg.cholesky_ex(matrix)[0]
    if not matrix.is_cuda:
        return torch.cholesky_inverse(lower)
    inverse = _rounded(_triangular_inverse(lower))
    return product_float32(inverse.T, inverse) if MIXED else inverse.T @ inverse


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


def _rounded(matrix: torch.Tensor) -> torch.Tensor:
    """On a GPU, in bfloat16, for its tensor cores. Held-out output error, mean of 5 matrices of SmolLM2-135M: .1349
    with products of float32, .1350 of factors rounded to bfloat16, .1351 to TF32."""
    return matrix.bfloat16() if matrix.is_cuda and MIXED else matrix


def _plus_product(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`base + left right`, of the precision of `right`."""
    if right.dtype == base.dtype:
        return torch.addmm(base, left, right)
    return product_float32(left.to(right.dtype), right).add_(base)


class _Terms:
    """The planes of all blocks: signs float `[N, K]` and `row` `[N, blocks]`, `col` `[K]` of each."""

    def __init__(self, weight: torch.Tensor, block_size: int, planes: int, col_scale: bool):
        columns = weight.shape[1]
        self.block_size = block_size
        self.col_scale = col_scale
        self.block = torch.arange(columns, device=weight.device) // block_size
        member = torch.zeros(columns, int(-(-columns // block_size)), device=weight.device)
        self.member = member.scatter_(1, self.block[:, None], 1.0)  # [K, blocks]
        self.patterns = sign_patterns(planes, weight)
        self.signs: list[torch.Tensor] = []
        self.row: list[torch.Tensor] = []
        self.col: list[torch.Tensor] = []
        residual = weight
        for _ in range(planes):
            self.signs.append(torch.where(residual >= 0, 1.0, -1.0))
            self.col.append(torch.ones_like(weight[0]))
            self.row.append(torch.zeros(len(weight), member.shape[1], device=weight.device))
            for _ in range(3):
                self._rescale(-1, residual * self.signs[-1])
            residual = residual - self._term(-1)

    def reconstruction(self) -> torch.Tensor:
        """Q, `[N, K]`."""
        total = self._term(0)
        for plane in range(1, len(self.signs)):
            total += self._term(plane)
        return total

    def nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """The nearest signs to `wanted` `[N, K]` with the scales as they are, then each plane's scales in turn, as in
        ARB-RC; returns the new Q."""
        if len(self.signs) == 1:
            self.signs[0] = torch.where(wanted >= 0, 1.0, -1.0)
            self._rescale(0, wanted.abs())
            return self._term(0)
        self._nearest_signs(wanted)
        residual = wanted - self.reconstruction()
        for plane in range(len(self.signs)):
            residual += self._term(plane)
            self._rescale(plane, residual * self.signs[plane])
            residual -= self._term(plane)
        return wanted - residual

    def _nearest_signs(self, wanted: torch.Tensor) -> None:
        sizes = [self._size(plane) for plane in range(len(self.signs))]
        goal = wanted.abs()
        best = torch.full_like(goal, torch.inf)
        taken = torch.zeros_like(goal, dtype=torch.int64)
        flipped = torch.zeros_like(goal, dtype=torch.bool)
        # levels come in pairs of opposite sign: half of the patterns serve |wanted|, their sign is put right after
        half = self.patterns[: len(self.patterns) // 2]
        for index, pattern in enumerate(half.tolist()):
            level = sizes[0] * pattern[0]
            for size, sign in zip(sizes[1:], pattern[1:], strict=True):
                level = torch.add(level, size, alpha=sign)
            distance = (goal - level.abs()).abs_()
            nearer = distance < best
            best = torch.minimum(best, distance)
            taken.masked_fill_(nearer, index)
            flipped = torch.where(nearer, level < 0, flipped)
        turn = torch.where((wanted >= 0) == flipped, -1.0, 1.0)
        for plane in range(len(self.signs)):
            self.signs[plane] = half[:, plane][taken] * turn

    def _rescale(self, plane: int, size: torch.Tensor) -> None:
        """Row, then column scales of a plane by least squares: of the rank-one matrix of each block that is nearest to
        `size` `[N, K]`."""
        row, col = self.row[plane], self.col[plane]
        row = _divide(size @ (col[:, None] * self.member), col.square() @ self.member)
        self.row[plane] = row
        if self.col_scale:
            self.col[plane] = _divide((row[:, self.block] * size).sum(0), row.square().sum(0)[self.block])

    def _size(self, plane: int) -> torch.Tensor:
        return self.row[plane][:, self.block] * self.col[plane]

    def _term(self, plane: int) -> torch.Tensor:
        return self._size(plane) * self.signs[plane]

    def fits(self, size: torch.Tensor) -> list[PlanesFit]:
        """Block by block; `size` `[K]` is what the columns were scaled by."""
        signs = torch.stack(self.signs).split(self.block_size, 2)
        col = (torch.stack(self.col) / size).split(self.block_size, 1)
        if not self.col_scale:
            col = tuple(torch.ones_like(part) for part in col)
        row = torch.stack(self.row) / (1.0 if self.col_scale else size[0])
        return [
            PlanesFit(bits.contiguous(), row[:, :, index].contiguous(), scale.contiguous())
            for index, (bits, scale) in enumerate(zip(signs, col, strict=True))
        ]


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return numerator / torch.where(denominator > 0, denominator, 1.0)
