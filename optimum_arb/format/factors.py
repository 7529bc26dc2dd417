"""`FactorizedWeight`: a weight as the product of two scaled sign matrices, and its packed form.

    W ~ diag(row_scale) A diag(rank_scale) B diag(col_scale),    A in {-1, +1}^[N, r],  B in {-1, +1}^[r, K]

(double binary factorization: Boza and Macko 2025, "Addition is almost all you need"). Both products with x are those of
one sign plane without blocks (`optimum_arb.format.packing`, `block_size=-1`), so the operator and its kernels run
them as they are: `u = diag(rank_scale) B diag(col_scale) x`, then `y = diag(row_scale) A u`.

A factor can be moved between the three scales without a change of W. Packing moves powers of two, so that nothing is
rounded by it: the mean of `col_scale` becomes 1 and that of `row_scale` 1 / sqrt(r), up to a factor of sqrt(2) each;
`rank_scale` takes the rest and has the size of the weights. A sum of r signed values u is about sqrt(r) of them, so u,
which lives in the dtype of x, is as large as y: in float16 it overflows where the layer's output would. Negative
scales become positive ones, their signs those of the row or column of A or B that they stand at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .layout import Layout, planes_layout
from .packing import TILE, pack_bits, packed_bytes, unpack_bits
from .scales import decoded, store_coded, store_scale

# The packed tensors of each factor by the names of `optimum_arb.format.packing.TENSOR_NAMES`.
OUTER = {"weight": "weight", "row_scale": "row_scale"}
INNER = {"weight": "inner", "row_scale": "inner_row_scale", "col_scale": "inner_col_scale"}
FACTOR_TENSOR_NAMES = (*OUTER.values(), *INNER.values(), "scale_grid")
# What the operator takes each of them for.
OUTER_LAYOUT: Layout = planes_layout(1)
INNER_LAYOUT: Layout = planes_layout(1, col_scale=True)
LAYOUT_NAME = "factors"
# What is stored where that has less error than the factors in no more bits: one plane with a scale for each row.
ROUNDED_LAYOUT, ROUNDED_BLOCK = planes_layout(1), -1
# The tensors of scales -> how many grids each has in 8 bits, in the order of `scale_grid`.
SCALE_GRIDS = {"row_scale": 1, "inner_row_scale": 1, "inner_col_scale": 1}


@dataclass
class FactorizedWeight:
    """A weight of shape `[N, K]` (out_features, in_features) as a chain of two sign matrices of rank r, unpacked.

    Attributes:
        outer_signs: bool `[N, r]`, A, True = +1.
        inner_signs: bool `[r, K]`, B.
        row_scale: float `[N]`.
        rank_scale: float `[r]`.
        col_scale: float `[K]`.
        scale_grid: grids of 8 bits that scales are on, as `pack_factors` takes them, rows of 0 for those on none; or
            None.
    """

    outer_signs: torch.Tensor
    inner_signs: torch.Tensor
    row_scale: torch.Tensor
    rank_scale: torch.Tensor
    col_scale: torch.Tensor
    scale_grid: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.outer_signs.shape[0], self.inner_signs.shape[1]

    @property
    def rank(self) -> int:
        return self.inner_signs.shape[0]

    @property
    def device(self) -> torch.device:
        return self.outer_signs.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[N, K]` that this stands for, computed in float32 (float64 if asked) and cast to `dtype`."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        row, rank, col = (scale.to(compute)[:, None] for scale in (self.row_scale, self.rank_scale, self.col_scale))
        outer = torch.where(self.outer_signs, row, -row)
        inner = torch.where(self.inner_signs, rank, -rank)
        return ((outer @ inner) * col.T).to(dtype)

    def balanced(self) -> FactorizedWeight:
        """The same weight, its scales in float32, positive, and of the sizes that the top of this file says.

        Exact, but for what float32 cannot hold; a second time changes nothing but, where a mean is within a rounding of
        the bound, a power of two.

        Raises:
            ValueError: a scale is NaN or Inf.
        """
        row, rank, col = (scale.to(torch.float32) for scale in (self.row_scale, self.rank_scale, self.col_scale))
        for name, scale in (("row_scale", row), ("rank_scale", rank), ("col_scale", col)):
            if not torch.isfinite(scale).all():
                raise ValueError(f"the {name} of its factors holds NaN or Inf")
        outer = self.outer_signs ^ (row < 0)[:, None]
        inner = self.inner_signs ^ (rank < 0)[:, None] ^ (col < 0)[None]
        row, rank, col = row.abs(), rank.abs(), col.abs()
        of_row, of_col = _power_of_two(row, 1 / math.sqrt(self.rank)), _power_of_two(col, 1.0)
        return FactorizedWeight(outer, inner, row / of_row, rank * (of_row * of_col), col / of_col)


def _power_of_two(scale: torch.Tensor, size: float) -> float:
    """The power of two by which values must be divided for their mean to be `size`, up to a factor of sqrt(2)."""
    mean = float(scale.double().mean()) if scale.numel() else 0.0
    return 2.0 ** round(math.log2(mean / size)) if mean > 0 else 1.0


def _octaves(scale: torch.Tensor, balanced: torch.Tensor) -> float:
    largest = float(scale.abs().max())
    return float(round(math.log2(float(balanced.max()) / largest))) if largest > 0 else 0.0


def pack_factors(
    weight: FactorizedWeight, scale_bits: int = 16, scale_grid: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that are stored, all of two dimensions, by their names in `FACTOR_TENSOR_NAMES`.

    Args:
        weight: the weight.
        scale_bits: 16, or 8 for scales that are codes on the grids of `scale_grid`, see `optimum_arb.format.scales`.
        scale_grid: grids to take where no others have a lower error, as for scales that are on them; None for those of
            the weight.

    | name | dtype | shape |
    |---|---|---|
    | `weight` | uint8 | `[N, packed_bytes(r)]`, the outer factor |
    | `row_scale` | float16 (float32 where float16 cannot hold it) | `[N, 1]` |
    | `inner` | uint8 | `[r, packed_bytes(K)]`, the inner factor |
    | `inner_row_scale` | as `row_scale` | `[r, 1]`, the `rank_scale` |
    | `inner_col_scale` | as `row_scale` | `[1, K]`, the `col_scale` |
    | `scale_grid` | float32 | `[3, 2]`, with `scale_bits=8` alone |

    Raises:
        ValueError: a scale is NaN or Inf.
    """
    scale_grid = weight.scale_grid if scale_grid is None else scale_grid
    before, weight = weight, weight.balanced()
    tensors = {"weight": pack_bits(weight.outer_signs[None]), "inner": pack_bits(weight.inner_signs[None])}
    scales = {
        "row_scale": weight.row_scale[:, None],
        "inner_row_scale": weight.rank_scale[:, None],
        "inner_col_scale": weight.col_scale[None],
    }
    if scale_bits == 8:
        if scale_grid is not None:  # balanced by powers of two, which move a logarithmic grid
            pairs = zip((before.row_scale, before.rank_scale, before.col_scale), scales.values(), strict=True)
            moves = [_octaves(one, other) for one, other in pairs]
            moved = [[move if grid.any() else 0.0, 0.0] for move, grid in zip(moves, scale_grid, strict=True)]
            scale_grid = scale_grid + torch.tensor(moved, device=scale_grid.device)
        coded, tensors["scale_grid"] = store_coded(scales, SCALE_GRIDS, scale_grid)
    else:
        coded = {name: store_scale(scale) for name, scale in scales.items()}
    tensors.update(coded)
    return {name: tensors[name].contiguous() for name in FACTOR_TENSOR_NAMES if name in tensors}


def unpack_factors(tensors: Mapping[str, torch.Tensor], in_features: int) -> FactorizedWeight:
    """The inverse of `pack_factors`, up to its balance and the rounding of the scales.

    Args:
        tensors: as `pack_factors` returns them.
        in_features: K.
    """
    tensors = decoded(tensors, SCALE_GRIDS)
    rank = tensors["inner"].shape[0]
    return FactorizedWeight(
        unpack_bits(tensors["weight"], 1, rank)[0],
        unpack_bits(tensors["inner"], 1, in_features)[0],
        tensors["row_scale"][:, 0],
        tensors["inner_row_scale"][:, 0],
        tensors["inner_col_scale"][0],
    )


def factor_shapes(out_features: int, in_features: int, rank: int, scale_bits: int = 16) -> dict[str, tuple[int, int]]:
    """The shape of every stored tensor of a factorized weight, from its description alone (see `pack_factors`)."""
    shapes = {
        "weight": (out_features, packed_bytes(rank, TILE)),
        "row_scale": (out_features, 1),
        "inner": (rank, packed_bytes(in_features, TILE)),
        "inner_row_scale": (rank, 1),
        "inner_col_scale": (1, in_features),
    }
    if scale_bits == 8:
        shapes["scale_grid"] = (sum(SCALE_GRIDS.values()), 2)
    return shapes


def rank_for_bits(out_features: int, in_features: int, bits: float, scale_bits: int = 16) -> int:
    """The largest rank whose stored tensors take at most so many bits a weight; at least 1.

    Args:
        out_features: N.
        in_features: K.
        bits: stored bits over N K, everything counted.
        scale_bits: of a scale: 16 or 8.
    """
    budget = bits * out_features * in_features
    rank = int((budget - scale_bits * (out_features + in_features)) / (out_features + in_features + scale_bits))
    while rank > 1 and stored_bits(out_features, in_features, rank, scale_bits) > budget:
        rank -= 1  # rows end at whole bytes, which the division above does not know
    return max(rank, 1)


def stored_bits(out_features: int, in_features: int, rank: int, scale_bits: int = 16) -> int:
    """The bits of the tensors of `pack_factors`, scales in float16 or in 8 bits."""
    signs = out_features * packed_bytes(rank, TILE) + rank * packed_bytes(in_features, TILE)
    grids = 64 * sum(SCALE_GRIDS.values()) if scale_bits == 8 else 0
    return 8 * signs + scale_bits * (out_features + rank + in_features) + grids


def rounded_bits(out_features: int, in_features: int, scale_bits: int = 16) -> int:
    """Likewise of one plane of `ROUNDED_LAYOUT`."""
    return out_features * (8 * packed_bytes(in_features, TILE) + scale_bits) + (64 if scale_bits == 8 else 0)
