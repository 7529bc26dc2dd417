"""From a weight and its calibration matrix to a `BinarizedWeight` or `FactorizedWeight`: pure functions of tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable

import torch

from ..config import BITMAP_METHODS, ARBConfig
from ..format.factors import (
    ROUNDED_BLOCK,
    ROUNDED_LAYOUT,
    FactorizedWeight,
    pack_factors,
    rounded_bits,
    stored_bits,
    unpack_factors,
)
from ..format.hadamard import random_signs, rotate
from ..format.packing import BinarizedWeight
from ..spare_threads import product
from .admm import admm_planes
from .assembly import assemble_bitmap, assemble_planes
from .bitmap import BitmapFit, fit_bitmap_block
from .coded_scales import code_columns, code_scales
from .compensation import binarize_blocks
from .guard import no_worse_than_rounding, round_to_nearest, rounding_is_better
from .hessian import PreparedHessian, identity_hessian
from .planes import PlanesFit, fit_planes
from .preparation import prepared_part
from .refinement import refine_blocks
from .shared_work import made_elsewhere

__all__ = ["binarize", "hadamard_gain", "output_error", "outputs_energy", "outputs_key", "squared_errors"]

GAIN_ROWS = 128  # of the fits that tell whether a Hadamard transform pays


def binarize(
    weight: torch.Tensor, hessian: torch.Tensor | None, config: ARBConfig
) -> BinarizedWeight | FactorizedWeight:
    """Binarizes one weight.

    Args:
        weight: `[N, K]` (out_features, in_features), any float dtype; computed in float32, on its device.
        hessian: `X^T X` of the layer's inputs, `[K, K]`, at any positive scale; None for no calibration, where every
            method minimizes the plain squared error of the weights.
        config: the choices, overrides applied (`ARBConfig.for_module`).

    Returns:
        The binarized weight, scales in float32. A `FactorizedWeight` of "arb-dbf", unless round-to-nearest of whole
        rows has less error in no more bits, then that; of other methods a `BinarizedWeight`, without a Hadamard
        transform where round-to-nearest has less error than the fit with one.

    Raises:
        ValueError: NaN or Inf in the weight or the calibration matrix, or shapes that do not fit.
    """
    if weight.ndim != 2 or (hessian is not None and hessian.shape != (weight.shape[1], weight.shape[1])):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not fit a calibration matrix of shape "
            f"{None if hessian is None else tuple(hessian.shape)}"
        )
    columns = weight.shape[1]
    target = weight.detach().to(torch.float32)
    if not torch.isfinite(target).all():
        raise ValueError("the weight has NaN or Inf, or what float32 does not hold")
    # a power of two, so exact: squares of tiny weights must not underflow
    unit = _power_of_two(target)
    target = target / unit
    if config.factorized:
        if hessian is not None:  # as in every method: what never has an input is nothing, not a part of a mean
            target = torch.where(hessian.diagonal() > 0, target, 0.0)
        factors = _factorize(target, hessian, config)
        factors.row_scale = factors.row_scale * unit
        return factors
    if config.hadamard and hessian is not None:
        result = _binarize_rotated(target, hessian, config)
        damping = config.resolved_damp_percent, config.resolved_shrinkage
        if not rounding_is_better(target, result.dequantize(), config.block_size, hessian, *damping):
            return result.times(unit)
    if hessian is None:
        config = copy.copy(config)
        config.dataset = None  # what no input reached is fitted as without calibration
        prepared = identity_hessian(columns, weight.device)
    else:
        prepared = prepared_part(hessian, config).once()
    if prepared.permutation is not None:
        target = target[:, prepared.permutation]
    target = torch.where(prepared.dead, 0.0, target)  # what never has an input may as well cost nothing
    if config.method == "rtn":
        result = _round_to_nearest(target, config)
    elif config.method in BITMAP_METHODS:
        result = _binarize_bitmap(target, prepared, config)
    else:
        result = _binarize_planes(target, prepared, config)
    result = result.times(unit)
    # the compensation as released is there to be compared with, bit for bit; scales of 8 bits stay on their grids
    released = hessian is not None and config.compensation != "exact"
    if not released and config.method != "rtn" and config.resolved_scale_bits == 16:
        result = no_worse_than_rounding(target, result, unit, None if hessian is None else prepared)
    result.permutation = prepared.permutation
    return result


def hadamard_gain(weight: torch.Tensor, hessian: torch.Tensor, config: ARBConfig) -> float:
    """What the Hadamard transform of `config` does to the output error of one weight, by fits of some of its rows.

    Fits with fewer iterations would not do: of 12 matrices of SmolLM2-135M, all of which gain 3 % or more in the end,
    3 seem to lose after 4 iterations and 4 block by block.

    Args:
        weight: `[N, K]`, any float dtype, finite.
        hessian: `X^T X` of the layer's inputs, `[K, K]`, finite.
        config: the choices, overrides applied.

    Returns:
        The output error without the transform over that with it: above 1, it pays. 1 where both are 0.
    """
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), GAIN_ROWS), device=weight.device).round().long()
    some = weight.detach()[rows].to(torch.float32)
    quick = copy.copy(config)
    quick.overrides = {}
    quick.scale_bits = None
    errors = []
    for block in (0, config.hadamard):
        quick.hadamard = block
        errors.append(output_error(some, binarize(some, hessian, quick).dequantize(), hessian))
    return errors[0] / errors[1] if errors[1] > 0 else (math.inf if errors[0] > 0 else 1.0)


def output_error(weight: torch.Tensor, reconstruction: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """The relative squared error of the outputs, `tr(E H E^T) / tr(W H W^T)`, E = W - reconstruction.

    Args:
        weight, reconstruction: `[N, K]`.
        hessian: `[K, K]`; None gives the relative squared error of the weights.

    Returns:
        0 for a weight whose outputs are all zero.
    """
    lost, total = squared_errors(weight, reconstruction, hessian)
    return lost / total if total > 0 else 0.0


def squared_errors(
    weight: torch.Tensor, reconstruction: torch.Tensor, hessian: torch.Tensor | None
) -> tuple[float, float]:
    """Numerator and denominator of `output_error`, which sum over matrices."""
    original = weight.to(torch.float32)
    error = original - reconstruction.to(torch.float32)
    if hessian is None:
        return float(error.double().square().sum()), float(original.double().square().sum())
    known = made_elsewhere(hessian, outputs_key(weight))
    return _outputs(error, original, hessian), known[0] if known else outputs_energy(original, hessian)


def outputs_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """`tr(W H W^T)`, the denominator of `output_error`; arguments as there."""
    original = weight.to(torch.float32)
    return _outputs(original, original, hessian)


def outputs_key(weight: torch.Tensor) -> Hashable:
    """By which a fit finds the `outputs_energy` of its weight where another rank has measured it: with the weight
    itself, which goes by its address."""
    return "outputs", weight.data_ptr(), tuple(weight.shape)


def _outputs(part: torch.Tensor, original: torch.Tensor, hessian: torch.Tensor) -> float:
    """`tr(P H P^T)` of a part of a weight; 0 where the rounding of H makes it negative."""
    # powers of two, so exact: products of three large or tiny numbers must not leave float32
    size, energy = _power_of_two(original), _power_of_two(hessian.diagonal())
    metric = (hessian / energy).to(torch.float32)
    part = part / size
    found = float((product(part, metric) * part).sum(dtype=torch.float64))
    return (0.0 if found < 0 else found) * size * size * energy


def _power_of_two(values: torch.Tensor) -> float:
    """The power of two at or below the largest absolute value; 1 where all are 0 or one is not finite."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0


def _binarize_rotated(target: torch.Tensor, hessian: torch.Tensor, config: ARBConfig) -> BinarizedWeight:
    """arb-hrc of `W T^T` under `T H T^T`, T a block Hadamard transform of the (permuted) columns with random signs."""
    permutation = None
    if config.resolved_act_order:
        permutation = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        target, hessian = target[:, permutation], hessian[permutation][:, permutation]
    target = torch.where(hessian.diagonal() > 0, target, 0.0)  # dead columns, before they are mixed with others
    signs = random_signs(len(hessian), config.seed).to(target.device)
    # exact, and no scale matters: sums over a block must not leave float32
    hessian = hessian / _power_of_two(hessian.diagonal())
    target, hessian = rotate(target, hessian, signs, config.hadamard)
    result = _binarize_planes(target, prepared_part(hessian, config, act_order=False).once(), config)
    result.permutation, result.hadamard, result.input_signs = permutation, config.hadamard, signs
    return result


def _binarize_planes(target: torch.Tensor, hessian: PreparedHessian, config: ARBConfig) -> BinarizedWeight:
    """arb-hrc: all blocks at once by ADMM or one after the other, then sweeps of refinement."""
    width = _width(config, target)
    col_scale = config.resolved_col_scale
    iterations = config.resolved_admm_iterations
    sweeps = config.resolved_refinement_sweeps

    def fit_block(block: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, PlanesFit]:
        factor = hessian.factor[start:stop, start:stop]
        fit = fit_planes(block, factor, config.planes, config.resolved_num_iterations, col_scale)
        return fit.reconstruction(), fit

    if iterations:
        fits = admm_planes(target, hessian.damped, width, config.planes, iterations, col_scale)
    else:
        fits = binarize_blocks(target.clone(), hessian, width, config.compensation, fit_block)
    refine_blocks(target, hessian, width, fits, sweeps, col_scale)
    coded = config.resolved_scale_bits == 8
    grid = code_scales(target, hessian, width, fits, col_scale) if coded else None
    result = assemble_planes(fits, config.layout, config.block_size)
    result.scale_grid = grid
    return result


def _factorize(
    target: torch.Tensor, hessian: torch.Tensor | None, config: ARBConfig
) -> BinarizedWeight | FactorizedWeight:
    """arb-dbf: a product of two sign matrices, or round-to-nearest of whole rows where that is better and no larger."""
    from .dbf import binarize_factors

    rows, columns = target.shape
    rank, scale_bits = config.resolved_rank(rows, columns), config.resolved_scale_bits
    damping = config.resolved_damp_percent
    factors = binarize_factors(target, hessian, rank, damping, config.resolved_num_iterations, config.seed)
    if scale_bits == 8 and hessian is not None:
        factors = code_columns(factors, hessian.diagonal())
    if stored_bits(rows, columns, rank, scale_bits) < rounded_bits(rows, columns, scale_bits):
        return factors
    stored = unpack_factors(pack_factors(factors, scale_bits), columns)
    if not rounding_is_better(target, stored.dequantize(), ROUNDED_BLOCK, hessian, damping):
        return factors
    bits, scale = round_to_nearest(target, ROUNDED_BLOCK)
    return BinarizedWeight(ROUNDED_LAYOUT, ROUNDED_BLOCK, bits[None], scale[:, :, None])


def _round_to_nearest(target: torch.Tensor, config: ARBConfig) -> BinarizedWeight:
    """Looks at no calibration."""
    bits, scale = round_to_nearest(target, config.block_size)
    return BinarizedWeight(config.layout, config.block_size, bits[None], scale[:, :, None])


def _binarize_bitmap(target: torch.Tensor, hessian: PreparedHessian, config: ARBConfig) -> BinarizedWeight:
    """BiLLM, ARB, ARB-X and ARB-RC."""
    diagonal = hessian.inverse_factor.diagonal()

    def fit_block(block: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, BitmapFit]:
        fit = fit_bitmap_block(
            block,
            score=(block / diagonal[start:stop]).square(),
            metric=hessian.matrix[start:stop, start:stop],
            method=config.method,
            group_bitmap=config.resolved_group_bitmap,
            salient=config.resolved_salient_columns,
            split_metric=config.split_metric,
            num_iterations=config.resolved_num_iterations,
        )
        return fit.reconstruction(), fit

    fits = binarize_blocks(target.clone(), hessian, _width(config, target), config.compensation, fit_block)
    return assemble_bitmap(fits, config.layout, config.block_size, config.resolved_group_bitmap)


def _width(config: ARBConfig, target: torch.Tensor) -> int:
    return target.shape[1] if config.block_size == -1 else config.block_size
