import pytest
import torch

from optimum_arb.algorithms.compensation import binarize_blocks
from optimum_arb.algorithms.hessian import prepare_hessian


def round_block(block, start, stop):
    rounded = (block * 4).round() / 4
    return rounded, rounded


def test_exact_compensation_is_the_least_squares_answer(weight, hessian):
    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    damped = prepared.factor.double() @ prepared.factor.double().T
    changed = weight.clone()
    seen = []

    def fit(block, start, stop):
        seen.append(block.clone())
        return round_block(block, start, stop)

    binarize_blocks(changed, prepared, 128, "exact", fit)
    error = (weight[:, :128] - round_block(weight[:, :128], 0, 128)[0]).double()
    # argmin over D of tr([E D] H [E D]^T), the change of the later columns
    best = -error @ damped[:128, 128:] @ torch.linalg.inv(damped[128:, 128:])
    # W_rest - D, since the error of the rest is W_rest - (W_rest - D)
    torch.testing.assert_close(seen[1].double(), weight[:, 128:256].double() - best[:, :128], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compensation", ["exact", "diagonal"])
def test_compensation_lowers_the_output_error(weight, hessian, compensation):
    def output_error(reconstruction):
        error = (weight - reconstruction).double()
        return float((error @ hessian.double() * error).sum())

    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    compensated = torch.cat(binarize_blocks(weight.clone(), prepared, 64, compensation, round_block), 1)
    plain = torch.cat([round_block(weight[:, i : i + 64], 0, 0)[0] for i in range(0, 320, 64)], 1)
    assert output_error(compensated) < output_error(plain)


def test_forms_agree_for_single_columns(weight, hessian):
    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    exact = torch.cat(binarize_blocks(weight.clone(), prepared, 1, "exact", round_block), 1)
    diagonal = torch.cat(binarize_blocks(weight.clone(), prepared, 1, "diagonal", round_block), 1)
    torch.testing.assert_close(exact, diagonal, rtol=1e-3, atol=1e-4)
