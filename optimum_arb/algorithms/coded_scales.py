"""Scales of sign planes in 8 bits: rounded to a grid, and everything else fitted again around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..format.scales import encode_scales, nearest_on_grid
from .hessian import PreparedHessian
from .planes import PlanesFit, normalize
from .refinement import refine_blocks

SWEEPS = 1  # of refinement around rounded scales


@dataclass
class GridRounding:
    """Rounds scales to grids of `optimum_arb.format.scales`, one for row and one for column scales of each plane.

    Attributes:
        row_grid: float32 `[P, 2]`.
        col_grid: likewise, or None where there are no column scales.
    """

    row_grid: torch.Tensor
    col_grid: torch.Tensor | None

    @classmethod
    def of(cls, fits: list[PlanesFit], col_scale: bool) -> GridRounding | None:
        """The grids that suit the scales of all blocks, none of them negative; None where float16 holds none."""
        rows = _grids(torch.cat([fit.row for fit in fits], 1))
        cols = _grids(torch.cat([fit.col for fit in fits], 1)) if col_scale else None
        return None if rows is None or (col_scale and cols is None) else cls(rows, cols)

    def row(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest values to row scales float32 `[P, N]`; signs stay."""
        return _round(scale, self.row_grid)

    def col(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest values to column scales float32 `[P, k]`; signs stay."""
        return scale if self.col_grid is None else _round(scale, self.col_grid)


def code_scales(
    weight: torch.Tensor, hessian: PreparedHessian, block_size: int, fits: list[PlanesFit], col_scale: bool = True
) -> torch.Tensor | None:
    """Rounds all scales to 8-bit grids, then refines signs and scales around them, in place.

    The refinement lowers the objective from what rounding made it or leaves it. Where float16 holds no grid for the
    scales, they stay as they are.

    Args:
        weight, hessian, block_size, fits, col_scale: as in `refine_blocks`.

    Returns:
        The grids, float32 `[P or 2 P, 2]`, those of the row scales first; None where there are none.
    """
    for fit in fits:
        normalize(fit)
    rounding = GridRounding.of(fits, col_scale)
    if rounding is None:
        return None
    for fit in fits:
        fit.row, fit.col = rounding.row(fit.row), rounding.col(fit.col)
    refine_blocks(weight, hessian, block_size, fits, SWEEPS, col_scale, rounding)
    return rounding.row_grid if rounding.col_grid is None else torch.cat([rounding.row_grid, rounding.col_grid])


def _grids(scale: torch.Tensor) -> torch.Tensor | None:
    """float32 `[P, 2]` of scales `[P, n]`."""
    found = [encode_scales(plane) for plane in scale]
    return None if any(one is None for one in found) else torch.stack([one[1] for one in found if one is not None])


def _round(scale: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return nearest_on_grid(scale.T, grid).T
