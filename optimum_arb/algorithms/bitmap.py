"""One block of BiLLM, ARB, ARB-X or ARB-RC: its partition, the fit of its zones, and its place in the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .arb import arb
from .arb_rc import arb_rc
from .arb_x import arb_x
from .partition import large_weights, salient_columns
from .residual import ZoneFit, residual_binarization


@dataclass
class BitmapFit:
    """A block of `[N, k]` weights.

    Attributes:
        rest, salient: the fits of the two zones; `salient` is None without salient columns.
        rest_columns, salient_columns: int64, the zones' columns within the block.
    """

    rest: ZoneFit
    salient: ZoneFit | None
    rest_columns: torch.Tensor
    salient_columns: torch.Tensor

    def reconstruction(self) -> torch.Tensor:
        """Q, float `[N, k]`."""
        rest = self.rest.reconstruction()
        total = rest.new_zeros(len(rest), len(self.rest_columns) + len(self.salient_columns))
        total[:, self.rest_columns] = rest
        if self.salient is not None:
            total[:, self.salient_columns] = self.salient.reconstruction()
        return total


def fit_bitmap_block(
    weight: torch.Tensor,
    score: torch.Tensor,
    metric: torch.Tensor,
    method: str,
    group_bitmap: str,
    salient: str | int,
    split_metric: str,
    num_iterations: int,
) -> BitmapFit:
    """Partitions a block and fits its zones: salient columns at order 2, the others at order 1.

    Args:
        weight: float32 `[N, k]`, the compensated weights of the block.
        score: float32 `[N, k]`, `W^2 / diag(U)^2` (BiLLM's salience).
        metric: float32 `[k, k]`, the undamped block of `X^T X` (ARB-X alone uses it).
        method: "billm", "arb", "arb-x" or "arb-rc".
        group_bitmap: "none", "non-salient" or "all" (the column-group bitmap).
        salient: "search", or a number of columns.
        split_metric: "weight" or "score".
        num_iterations: rounds of the refinement.
    """
    columns = torch.arange(weight.shape[1], device=weight.device)
    values = weight if split_metric == "weight" else score
    chosen = columns[:0] if salient == 0 else salient_columns(values, score, salient)
    is_salient = torch.zeros_like(columns, dtype=torch.bool)
    is_salient[chosen] = True
    rest = columns[~is_salient]

    def fit_zone(zone: torch.Tensor, order: int, magnitude: torch.Tensor | None) -> ZoneFit:
        if magnitude is None:
            groups = torch.ones(1, len(weight), len(zone), dtype=weight.dtype, device=weight.device)
        else:
            large = large_weights(values[:, zone], magnitude, order).to(weight.dtype)
            groups = torch.stack([large, 1 - large])
        target = weight[:, zone]
        if method == "billm":
            return residual_binarization(target, groups, order)
        if method == "arb":
            return arb(target, groups, order, num_iterations)
        if method == "arb-x":
            return arb_x(target, groups, order, num_iterations, metric[zone][:, zone])
        return arb_rc(target, groups, order, num_iterations)

    magnitude = None
    if group_bitmap != "none":
        # salient entries count as zeros in the quantiles, as released
        magnitude = torch.where(is_salient, 0.0, values.abs())
    rest_fit = fit_zone(rest, 1, magnitude)
    salient_fit = None
    if len(chosen):
        magnitude = None
        if group_bitmap == "all":
            magnitude = values[:, chosen].abs()
            magnitude = magnitude[magnitude > 0]
        salient_fit = fit_zone(chosen, 2, magnitude)
    return BitmapFit(rest_fit, salient_fit, rest, chosen)


def row_scales(fit: BitmapFit, group_bitmap: str) -> torch.Tensor:
    """The block's row scales in the order of `optimum_arb.layout.bitmap_layout`, float `[N, row_scales]`.

    A block too narrow for salient columns stores zeros for them.
    """
    rest = _zone_rows(fit.rest, [0])
    if group_bitmap == "none" and fit.rest.mean is not None:
        rest = torch.cat([fit.rest.scale[:, :, 0], fit.rest.mean], 1)
    if fit.salient is None:
        return rest
    zone = fit.salient
    if group_bitmap == "all":
        salient = torch.cat([_zone_rows(zone, [0]), _zone_rows(zone, [1], with_mean=False)], 1)
    else:
        salient = zone.scale[:, 0] if zone.mean is None else torch.cat([zone.scale[:, 0], zone.mean], 1)
    return torch.cat([rest, salient], 1)


def _zone_rows(zone: ZoneFit, orders: list[int], with_mean: bool = True) -> torch.Tensor:
    """Scales (and means) of the groups: as they are with column scales, else as half sums and half differences."""
    scales = [zone.scale[:, :, o] for o in orders]
    if zone.mean is None:
        return torch.cat(scales, 1)
    values = scales + ([zone.mean] if with_mean else [])
    if zone.scale.shape[1] == 1:
        return torch.cat(values, 1)
    return torch.cat([torch.stack([(v[:, 0] + v[:, 1]) / 2, (v[:, 0] - v[:, 1]) / 2], 1) for v in values], 1)


def sign_planes(fit: BitmapFit, group_bitmap: str) -> torch.Tensor:
    """The block's planes over all columns: bool `[planes, N, k]`.

    Plane 0 holds the first sign; plane 1, with groups, that sign turned round in the group of small weights, and where
    salient columns have no groups, their second sign.
    """
    rows = fit.rest.signs.shape[1]
    columns = len(fit.rest_columns) + len(fit.salient_columns)
    planes = torch.zeros(
        1 if group_bitmap == "none" else 2, rows, columns, dtype=torch.bool, device=fit.rest.signs.device
    )
    for zone, at in ((fit.rest, fit.rest_columns), (fit.salient, fit.salient_columns)):
        if zone is None:
            continue
        planes[0][:, at] = zone.signs[0]
        if len(planes) == 2:
            if zone is fit.salient and group_bitmap == "non-salient":
                planes[1][:, at] = zone.signs[1]
            else:
                planes[1][:, at] = zone.signs[0] == (zone.groups[0] > 0)
    return planes


def col_scales(fit: BitmapFit, group_bitmap: str) -> torch.Tensor:
    """The block's column scales, float `[col_scales, k]`: of the groups, or of the salient columns' orders."""
    count = 1 if group_bitmap == "none" else 2
    columns = len(fit.rest_columns) + len(fit.salient_columns)
    scales = torch.zeros(count, columns, dtype=fit.rest.scale.dtype, device=fit.rest.scale.device)
    scales[:, fit.rest_columns] = fit.rest.col_scale[:, 0]
    if fit.salient is not None:
        by_group = group_bitmap == "all"
        scales[:, fit.salient_columns] = fit.salient.col_scale[:, 0] if by_group else fit.salient.col_scale[0, :count]
    return scales
