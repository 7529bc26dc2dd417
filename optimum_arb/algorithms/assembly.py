"""From the fits of the blocks to one `BinarizedWeight`: where each parameter stands in the layout."""

from __future__ import annotations

import torch

from ..format.layout import Layout
from ..format.packing import BinarizedWeight
from .bitmap import BitmapFit
from .planes import PlanesFit
from .residual import ZoneFit


def assemble_planes(fits: list[PlanesFit], layout: Layout, block_size: int) -> BinarizedWeight:
    """The weight of blocks of sign planes (arb-hrc, and round-to-nearest, whose layout has no column scales)."""
    return BinarizedWeight(
        layout=layout,
        block_size=block_size,
        signs=torch.cat([fit.signs > 0 for fit in fits], 2),
        row_scale=torch.stack([fit.row.T for fit in fits], 1),
        col_scale=torch.cat([fit.col for fit in fits], 1) if layout.col_scales else None,
    )


def assemble_bitmap(fits: list[BitmapFit], layout: Layout, block_size: int, group_bitmap: str) -> BinarizedWeight:
    """The weight of blocks of BiLLM, ARB, ARB-X or ARB-RC.

    Args:
        fits: block by block.
        layout: `optimum_arb.format.layout.bitmap_layout` of the method, which says what each row scale is.
        block_size: as in `BinarizedWeight`.
        group_bitmap: "none", "non-salient" or "all".
    """
    rows = fits[0].rest.signs.shape[1]
    device = fits[0].rest.signs.device
    scales = torch.zeros(rows, len(fits), layout.row_scales, device=device)
    for index, fit in enumerate(fits):
        values = _row_scales(fit, group_bitmap)
        scales[:, index, : values.shape[1]] = values
    result = BinarizedWeight(
        layout=layout,
        block_size=block_size,
        signs=torch.cat([_sign_planes(fit, group_bitmap) for fit in fits], 2),
        row_scale=scales,
        col_scale=torch.cat([_col_scales(fit, group_bitmap) for fit in fits], 1) if layout.col_scales else None,
    )
    if layout.salient:
        salient = [fit.salient for fit in fits if fit.salient is not None]
        result.salient_columns = torch.cat([fit.salient_columns + index * block_size for index, fit in enumerate(fits)])
        if layout.salient_planes:
            none = torch.zeros(1, rows, 0, dtype=torch.bool, device=device)
            result.salient_signs = torch.cat([none, *(zone.signs[1:] for zone in salient)], 2)
        if layout.salient_col_scales:
            none = torch.zeros(layout.salient_col_scales, 0, device=device)
            result.salient_col_scale = torch.cat(
                [none, *(_salient_col_scales(zone, group_bitmap) for zone in salient)], 1
            )
    return result


def _row_scales(fit: BitmapFit, group_bitmap: str) -> torch.Tensor:
    """The block's row scales in the order of `optimum_arb.format.layout.bitmap_layout`, float `[N, row_scales]`.

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


def _sign_planes(fit: BitmapFit, group_bitmap: str) -> torch.Tensor:
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


def _col_scales(fit: BitmapFit, group_bitmap: str) -> torch.Tensor:
    """The block's column scales, float `[col_scales, k]`: of the groups, or of the salient columns' orders."""
    count = 1 if group_bitmap == "none" else 2
    columns = len(fit.rest_columns) + len(fit.salient_columns)
    scales = torch.zeros(count, columns, dtype=fit.rest.scale.dtype, device=fit.rest.scale.device)
    scales[:, fit.rest_columns] = _col_scale(fit.rest)[:, 0]
    if fit.salient is not None:
        salient = _col_scale(fit.salient)
        scales[:, fit.salient_columns] = salient[:, 0] if group_bitmap == "all" else salient[0, :count]
    return scales


def _salient_col_scales(zone: ZoneFit, group_bitmap: str) -> torch.Tensor:
    """The second-order column scales that the salient columns alone have, float `[salient_col_scales, s]`."""
    scales = _col_scale(zone)
    return scales[:, 1] if group_bitmap == "all" else scales[0, 1:]


def _col_scale(zone: ZoneFit) -> torch.Tensor:
    assert zone.col_scale is not None  # ARB-RC alone comes here
    return zone.col_scale
