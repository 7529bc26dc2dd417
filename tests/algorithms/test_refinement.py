import pytest
import torch

from optimum_arb.algorithms import output_error
from optimum_arb.algorithms.compensation import binarize_blocks
from optimum_arb.algorithms.hessian import prepare_hessian
from optimum_arb.algorithms.planes import fit_planes
from optimum_arb.algorithms.refinement import refine_blocks


def fitted(weight, hessian, planes):
    prepared = prepare_hessian(hessian, 0.01, act_order=True)
    target = weight[:, prepared.permutation]

    def fit_block(block, start, stop):
        fit = fit_planes(block, prepared.factor[start:stop, start:stop], planes, 1)
        return fit.reconstruction(), fit

    return target, prepared, binarize_blocks(target.clone(), prepared, 128, "exact", fit_block)


@pytest.mark.parametrize("planes", [1, 2])
def test_no_sweep_raises_the_objective(weight, hessian, planes):
    target, prepared, fits = fitted(weight, hessian, planes)
    full = prepared.factor @ prepared.factor.T
    errors = []
    for sweeps in (0, 1, 1, 1):
        refine_blocks(target, prepared, 128, fits, sweeps)
        errors.append(output_error(target, torch.cat([fit.reconstruction() for fit in fits], 1), full))
    assert errors[1] < 0.99 * errors[0]
    assert errors[3] <= errors[2] * (1 + 1e-5) <= errors[1] * (1 + 2e-5)


def test_sweeps_without_column_scales(weight, hessian):
    prepared = prepare_hessian(hessian, 0.01, act_order=False)

    def fit_block(block, start, stop):
        fit = fit_planes(block, prepared.factor[start:stop, start:stop], 1, 1, col_scale=False)
        return fit.reconstruction(), fit

    fits = binarize_blocks(weight.clone(), prepared, 128, "exact", fit_block)
    full = prepared.factor @ prepared.factor.T
    errors = []
    for sweeps in (0, 1, 1):
        refine_blocks(weight, prepared, 128, fits, sweeps, col_scale=False)
        errors.append(output_error(weight, torch.cat([fit.reconstruction() for fit in fits], 1), full))
    assert errors[1] < 0.99 * errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-5)
    assert all(torch.equal(fit.col, torch.ones_like(fit.col)) for fit in fits)


def test_scales_are_stored_as_they_were_fitted(weight, hessian):
    target, prepared, fits = fitted(weight, hessian, 2)
    refine_blocks(target, prepared, 128, fits, 1)
    for fit in fits:
        assert torch.equal(fit.row, fit.row.half().float())
        assert torch.equal(fit.col, fit.col.half().float())
