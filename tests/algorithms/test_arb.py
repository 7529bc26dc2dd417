from itertools import pairwise

import pytest
import torch

from optimum_arb.algorithms import arb as arb_module
from optimum_arb.algorithms import arb_rc as arb_rc_module
from optimum_arb.algorithms.arb import arb
from optimum_arb.algorithms.arb_rc import arb_rc
from optimum_arb.algorithms.arb_x import arb_x, refine_under_metric
from optimum_arb.algorithms.residual import residual_binarization


def two_groups(weight):
    large = (weight.abs() > weight.abs().median()).float()
    return torch.stack([large, 1 - large])


def error(weight, fit):
    return float((weight - fit.reconstruction()).double().square().sum())


@pytest.mark.parametrize("order", [1, 2])
def test_arb_never_raises_its_objective(weight, order):
    fit = residual_binarization(weight, two_groups(weight), order)
    errors = [error(weight, fit)]
    for _ in range(6):
        arb_module.refine_mean_and_scales(weight, fit)
        errors.append(error(weight, fit))
        arb_module.refine_signs(weight, fit)
        errors.append(error(weight, fit))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("order", [1, 2])
def test_arb_rc_never_raises_its_objective(weight, order):
    groups = two_groups(weight)
    fit = arb_rc(weight, groups, order, num_iterations=0)
    errors = [error(weight, fit)]
    for _ in range(6):
        arb_rc_module.refine_rows_and_columns(weight, fit)
        errors.append(error(weight, fit))
        if order == 2:
            arb_rc_module.refine_signs(weight, fit)
            errors.append(error(weight, fit))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


def test_arb_rc_recovers_a_rank_one_magnitude():
    generator = torch.Generator().manual_seed(3)
    magnitude = (torch.rand(20, 1, generator=generator) + 0.1) * (torch.rand(64, generator=generator) + 0.1)
    weight = magnitude * torch.where(torch.rand(20, 64, generator=generator) > 0.5, 1.0, -1.0)
    fit = arb_rc(weight, torch.ones(1, 20, 64), order=1, num_iterations=15)
    torch.testing.assert_close(fit.reconstruction(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_arb_x_never_raises_its_objective(weight, hessian, order):
    groups = two_groups(weight)

    def objective(fit):
        lost = 0.0
        for g, mask in enumerate(groups):
            masked = (mask * (weight - fit.group_reconstruction(g))).double()
            lost += float((masked @ hessian.double() * masked).sum())
        return lost

    fit = arb(weight, groups, order, num_iterations=3)
    errors = [objective(fit)]
    for _ in range(6):
        refine_under_metric(weight, fit, hessian)
        errors.append(objective(fit))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


def test_arb_x_keeps_the_signs_of_arb(weight, hessian):
    groups = two_groups(weight)
    assert torch.equal(arb(weight, groups, 2, 5).signs, arb_x(weight, groups, 2, 5, hessian).signs)


def test_arb_x_leaves_a_mean_that_one_token_does_not_show():
    """The token sums to zero, and so does what it sees of a mean, but for rounding."""
    for seed in range(0, 200, 4):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(8, 64, generator=generator)
        token = torch.randn(1, 64, generator=generator)
        token[0, -1] -= token.sum()
        fit = arb(weight, torch.ones(1, 8, 64), 1, 5)
        before = fit.mean.clone()
        for _ in range(15):
            refine_under_metric(weight, fit, token.T @ token)
        torch.testing.assert_close(fit.mean, before)


def test_arb_x_without_inputs_is_arb(weight):
    groups = two_groups(weight)
    plain, calibrated = arb(weight, groups, 1, 5), arb_x(weight, groups, 1, 5, torch.zeros(320, 320))
    torch.testing.assert_close(calibrated.reconstruction(), plain.reconstruction())


@pytest.mark.parametrize("fit", [arb, arb_rc])
def test_constant_and_zero_rows(fit):
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    weight[2] = -3.0
    for order in (1, 2):
        result = fit(weight, torch.ones(1, 3, 64), order, 15).reconstruction()
        torch.testing.assert_close(result, weight, atol=1e-5, rtol=1e-4)
