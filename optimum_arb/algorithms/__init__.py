"""From a weight and its calibration matrix to a `BinarizedWeight`: pure functions of tensors."""

from __future__ import annotations

import math

import torch

from ..config import BITMAP_METHODS, ARBConfig
from ..packing import BinarizedWeight
from .bitmap import BitmapFit, col_scales, fit_bitmap_block, row_scales, sign_planes
from .compensation import binarize_blocks
from .hessian import PreparedHessian, identity_hessian, prepare_hessian
from .planes import fit_planes

__all__ = ["binarize", "output_error"]


def binarize(weight: torch.Tensor, hessian: torch.Tensor | None, config: ARBConfig) -> BinarizedWeight:
    """Binarizes one weight.

    Args:
        weight: `[N, K]` (out_features, in_features), any float dtype; computed in float32, on its device.
        hessian: `X^T X` of the layer's inputs, `[K, K]`, at any positive scale; None for no calibration, where every
            method minimizes the plain squared error of the weights.
        config: the choices, overrides applied (`ARBConfig.for_module`).

    Returns:
        The binarized weight, scales in float32.

    Raises:
        ValueError: NaN or Inf in the weight or the calibration matrix, or shapes that do not fit.
    """
    if weight.ndim != 2 or (hessian is not None and hessian.shape != (weight.shape[1], weight.shape[1])):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not fit a calibration matrix of shape "
            f"{None if hessian is None else tuple(hessian.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or Inf")
    columns = weight.shape[1]
    target = weight.detach().to(torch.float32)
    # a power of two, so exact: squares of tiny weights must not underflow
    largest = float(target.abs().max()) if target.numel() else 0.0
    unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
    target = target / unit
    if hessian is None:
        prepared = identity_hessian(columns, weight.device)
    else:
        prepared = prepare_hessian(hessian, config.damp_percent, config.resolved_act_order)
    if prepared.permutation is not None:
        target = target[:, prepared.permutation]
    else:
        target = target.clone()
    target[:, prepared.dead] = 0.0  # what never has an input may as well cost nothing
    fit = _binarize_bitmap if config.method in BITMAP_METHODS else _binarize_planes
    result = fit(target, prepared, config)
    result.row_scale = result.row_scale * unit
    return result


def output_error(weight: torch.Tensor, reconstruction: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """The relative squared error of the outputs, `tr(E H E^T) / tr(W H W^T)`, E = W - reconstruction.

    Args:
        weight, reconstruction: `[N, K]`.
        hessian: `[K, K]`; None gives the relative squared error of the weights.

    Returns:
        0 for a weight whose outputs are all zero.
    """
    original = weight.to(torch.float32)
    error = original - reconstruction.to(torch.float32)
    if hessian is None:
        lost, total = error.double().square().sum(), original.double().square().sum()
    else:
        metric = hessian.to(torch.float32)
        lost = ((error @ metric) * error).sum(dtype=torch.float64)
        total = ((original @ metric) * original).sum(dtype=torch.float64)
    return float(lost / total) if float(total) > 0 else 0.0


def _width(config: ARBConfig, columns: int) -> int:
    return columns if config.block_size == -1 else config.block_size


def _binarize_planes(target: torch.Tensor, hessian: PreparedHessian, config: ARBConfig) -> BinarizedWeight:
    """Round-to-nearest and arb-hrc."""

    def fit_block(block: torch.Tensor, start: int, stop: int):
        if config.method == "rtn":
            return round_to_nearest(block)
        fit = fit_planes(block, hessian.block_metric(start, stop), config.planes, config.resolved_num_iterations)
        return fit.reconstruction(), (fit.signs > 0, fit.row.T, fit.col)

    compensated = identity_hessian(target.shape[1], target.device) if config.method == "rtn" else hessian
    fits = binarize_blocks(target, compensated, _width(config, target.shape[1]), config.compensation, fit_block)
    return BinarizedWeight(
        layout=config.layout,
        block_size=config.block_size,
        signs=torch.cat([signs for signs, _, _ in fits], 2),
        row_scale=torch.stack([row for _, row, _ in fits], 1),
        col_scale=torch.cat([col for _, _, col in fits], 1) if config.layout.col_scales else None,
        permutation=hessian.permutation,
    )


def round_to_nearest(block: torch.Tensor):
    """`sign(W)` with the row scale `mean|W|`, the nearest sign and the least-squares scale (XNOR-Net, arXiv
    1603.05279)."""
    scale = block.abs().mean(1, keepdim=True)
    bits = block >= 0
    return torch.where(bits, scale, -scale), (bits[None], scale, None)


def _binarize_bitmap(target: torch.Tensor, hessian: PreparedHessian, config: ARBConfig) -> BinarizedWeight:
    """BiLLM, ARB, ARB-X and ARB-RC."""
    bitmap = config.resolved_group_bitmap
    layout = config.layout
    diagonal = hessian.inverse_factor.diagonal()

    def fit_block(block: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, BitmapFit]:
        fit = fit_bitmap_block(
            block,
            score=(block / diagonal[start:stop]).square(),
            metric=hessian.matrix[start:stop, start:stop],
            method=config.method,
            group_bitmap=bitmap,
            salient=config.resolved_salient_columns,
            split_metric=config.split_metric,
            num_iterations=config.resolved_num_iterations,
        )
        return fit.reconstruction(), fit

    width = _width(config, target.shape[1])
    fits = binarize_blocks(target, hessian, width, config.compensation, fit_block)
    rows = torch.zeros(len(target), len(fits), layout.row_scales, device=target.device)
    for index, fit in enumerate(fits):
        values = row_scales(fit, bitmap)
        rows[:, index, : values.shape[1]] = values
    result = BinarizedWeight(
        layout=layout,
        block_size=config.block_size,
        signs=torch.cat([sign_planes(fit, bitmap) for fit in fits], 2),
        row_scale=rows,
        col_scale=torch.cat([col_scales(fit, bitmap) for fit in fits], 1) if layout.col_scales else None,
        permutation=hessian.permutation,
    )
    if layout.salient:
        salient = [fit.salient for fit in fits if fit.salient is not None]
        starts = range(0, target.shape[1], width)
        result.salient_columns = torch.cat([f.salient_columns + s for f, s in zip(fits, starts, strict=True)])
        if layout.salient_planes:
            empty = target.new_zeros(1, len(target), 0, dtype=torch.bool)
            result.salient_signs = torch.cat([empty] + [zone.signs[1:] for zone in salient], 2)
        if layout.salient_col_scales:
            empty = target.new_zeros(layout.salient_col_scales, 0)
            result.salient_col_scale = torch.cat(
                [empty] + [zone.col_scale[:, 1] if bitmap == "all" else zone.col_scale[0, 1:] for zone in salient], 1
            )
    return result
