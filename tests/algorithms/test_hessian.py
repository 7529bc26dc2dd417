import pytest
import torch

from optimum_arb.algorithms.hessian import prepare_hessian


def test_factors(hessian):
    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    full = hessian.double() / hessian.double().diagonal().mean()
    damped = full + 0.01 * torch.eye(320, dtype=torch.float64)
    upper, factor = prepared.inverse_factor.double(), prepared.factor.double()
    assert torch.equal(upper.triu(), upper)
    assert torch.equal(factor.triu(), factor)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-4, atol=1e-5)


def test_block_metric_is_the_schur_complement(hessian):
    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    damped = prepared.factor.double() @ prepared.factor.double().T
    b, rest = slice(64, 128), slice(128, 320)
    schur = damped[b, b] - damped[b, rest] @ torch.linalg.solve(damped[rest, rest], damped[rest, b])
    torch.testing.assert_close(prepared.block_metric(64, 128).double(), schur, rtol=1e-3, atol=1e-4)


def test_scale_of_the_hessian_does_not_matter(hessian):
    small, large = prepare_hessian(hessian * 1e-30, 0.01, True), prepare_hessian(hessian * 1e30, 0.01, True)
    torch.testing.assert_close(small.inverse_factor, large.inverse_factor)


def test_act_order_puts_dead_columns_last(hessian):
    hessian[7] = 0
    hessian[:, 7] = 0
    prepared = prepare_hessian(hessian, 0.01, act_order=True)
    assert prepared.permutation[-1] == 7
    assert prepared.dead.nonzero().flatten().tolist() == [319]
    energy = hessian.diagonal()[prepared.permutation]
    assert (energy[:-1] >= energy[1:]).all()


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_singular(rank):
    inputs = torch.randn(rank, 64, generator=torch.Generator().manual_seed(0))
    prepared = prepare_hessian(inputs.T @ inputs, 0.01, act_order=True)
    assert torch.isfinite(prepared.inverse_factor).all()
    assert torch.isfinite(prepared.factor).all()


def test_indefinite_is_damped_harder(hessian):
    hessian -= 0.2 * hessian.diagonal().mean() * torch.eye(320)  # rounding gone wrong: negative eigenvalues
    assert torch.linalg.eigvalsh(hessian.double()).min() < 0
    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    assert torch.isfinite(prepared.inverse_factor).all()


def test_nan_is_refused(hessian):
    hessian[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        prepare_hessian(hessian, 0.01, act_order=False)


@pytest.mark.parametrize("act_order", [True, False])
def test_without_the_inverse_the_rest_is_the_same(hessian, act_order):
    whole = prepare_hessian(hessian, 0.01, act_order, 0.05)
    half = prepare_hessian(hessian, 0.01, act_order, 0.05, inverse=False)
    assert half.inverse_factor.shape == (0, 0)
    assert torch.equal(half.factor, whole.factor)
    assert torch.equal(half.damped, whole.damped)
