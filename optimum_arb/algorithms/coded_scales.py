"""Scales of sign planes in 8 bits: rounded to a grid, and everything else fitted again around them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..format.factors import FactorizedWeight
from ..format.scales import decode_scales, encode_scales, nearest_on_grid
from .hessian import PreparedHessian
from .planes import PlanesFit, normalize
from .refinement import refine_blocks

SWEEPS = 1  # of refinement around rounded scales
# Of the outputs' energy, what the rounding of column scales may cost before their grid is chosen by that. A column of
# weights of a hundredth of the others' size, and of inputs a thousand times as large, else became zero: output error
# 0.52 in place of 0.36. The usual rounding costs 1e-5.
MOST_LOST = 1e-3


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
    def of(cls, fits: list[PlanesFit], col_scale: bool, energy: torch.Tensor | None = None) -> GridRounding | None:
        """The grids that suit the scales of all blocks, none of them negative; None where float16 holds none.

        Args:
            fits: of the blocks.
            col_scale: whether there are column scales.
            energy: of the inputs, the diagonal of the calibration matrix, float32 `[K]`; the same of all unless given.
        """
        rows = _grids(torch.cat([fit.row for fit in fits], 1))
        cols = None
        if col_scale:
            importance = torch.cat([fit.row.square().sum(1, keepdim=True).expand_as(fit.col) for fit in fits], 1)
            cols = _grids(
                torch.cat([fit.col for fit in fits], 1), importance if energy is None else importance * energy
            )
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
    # undamped: beside a massive input the damping is more than the energy of all others
    rounding = GridRounding.of(fits, col_scale, hessian.matrix.diagonal())
    if rounding is None:
        return None
    for fit in fits:
        fit.row, fit.col = rounding.row(fit.row), rounding.col(fit.col)
    refine_blocks(weight, hessian, block_size, fits, SWEEPS, col_scale, rounding)
    return rounding.row_grid if rounding.col_grid is None else torch.cat([rounding.row_grid, rounding.col_grid])


def code_columns(factors: FactorizedWeight, energy: torch.Tensor) -> FactorizedWeight:
    """A product of two sign matrices with its column scales on a grid, where the one that they get when they are packed
    would cost too much of the outputs; else as it is.

    Args:
        factors: the product.
        energy: of the inputs, the diagonal of the calibration matrix, `[K]`.
    """
    size = factors.col_scale.abs()
    usual, grids = encode_scales(size), _grids(size[None], (energy / energy.max()).to(size)[None])
    if usual is None or grids is None or torch.equal(usual[1], grids[0]):
        return factors
    none = torch.zeros(2, 2, device=grids.device)
    col_scale = _round(factors.col_scale[None], grids)[0]
    return replace(factors, col_scale=col_scale, scale_grid=torch.cat([none, grids]))


def _grids(scale: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor | None:
    """float32 `[P, 2]` of scales `[P, n]`, and of what their squared errors count, likewise."""
    grids = []
    for index, plane in enumerate(scale):
        found = encode_scales(plane)
        if found is None:
            return None
        if importance is not None:
            error = (decode_scales(*found).to(plane.dtype) - plane).square()
            if (error * importance[index]).sum() > MOST_LOST * (plane.square() * importance[index]).sum():
                found = encode_scales(plane, importance=importance[index])
                assert found is not None  # there is one
        grids.append(found[1])
    return torch.stack(grids)


def _round(scale: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return nearest_on_grid(scale.T, grid).T
