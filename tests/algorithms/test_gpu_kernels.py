"""The kernels of the group search and of ARB-RC against torch's operators, in Triton's interpreter."""

import copy

import pytest
import torch

from optimum_arb.algorithms import arb_rc as R
from optimum_arb.algorithms import arb_rc_kernels as A
from optimum_arb.algorithms import partition as P
from optimum_arb.algorithms import split_kernel as S

pytestmark = pytest.mark.skipif(S.triton is None, reason="needs triton")


def values(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator).mul(3).exp()


@pytest.mark.parametrize(("rows", "columns"), [(37, 12), (5, 33)])
def test_gain_of_the_first_columns(rows, columns):
    block = values(rows, columns).square()
    expected = P._salient_gain(block, columns - 1)
    found = S.split_gain(block, torch.arange(1, columns), 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.argmax() == expected.argmax()


@pytest.mark.parametrize("order", [1, 2])
def test_gain_of_each_threshold(order):
    block = values(21, 24, seed=order).double()
    thresholds = torch.cat([block.abs().quantile(torch.linspace(0.1, 0.9, 9).double()), torch.tensor([0.0, 1e9])])
    expected = P._split_gain(block, thresholds, order)
    torch.testing.assert_close(S.split_gain(block, thresholds, order), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("split", [False, True])
def test_rounds_of_arb_rc(order, split):
    weight = values(70, 19, seed=3)
    weight[:, 4] = 0.0
    weight[7] = 0.0
    large = (weight.abs() >= 1.5).float()
    groups = torch.stack([large, 1 - large]) if split else torch.ones(1, *weight.shape)
    start = R._start(weight, groups, order)
    expected, found = copy.deepcopy(start), copy.deepcopy(start)
    for _ in range(4):
        R.refine_rows_and_columns(weight, expected)
        if order > 1:
            R.refine_signs(weight, expected)
    A.alternate(weight, found, 4)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.col_scale, expected.col_scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.reconstruction(), expected.reconstruction(), rtol=1e-4, atol=1e-5)
    assert (found.signs != start.signs).any() == (order > 1)


def test_a_round_never_raises_the_error():
    weight = values(33, 16, seed=5)
    fit = R._start(weight, torch.ones(1, *weight.shape), 2)
    before = float((weight - fit.reconstruction()).double().square().sum())
    for _ in range(3):
        A.alternate(weight, fit, 1)
        after = float((weight - fit.reconstruction()).double().square().sum())
        assert after <= before * (1 + 1e-6)
        before = after


def test_no_kernel_on_the_cpu_or_for_wide_blocks():
    assert not S.has_kernel(torch.ones(2, 2))
    assert not A.has_kernels(torch.ones(2, 2))
