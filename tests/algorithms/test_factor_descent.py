import pytest
import torch

from optimum_arb.algorithms import factor_descent as F


def objective(weight, hessian, factors):
    error = (weight - factors.reconstruction()).double()
    return float((error @ hessian.double() * error).sum())


def random_factors(rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape):
        return torch.where(torch.rand(*shape, generator=generator) < 0.5, -1.0, 1.0)

    def scale(size):
        return 0.5 + torch.rand(size, generator=generator)

    return F.Factors(signs(rows, rank), signs(rank, columns), scale(rows), scale(rank) / rank, scale(columns))


STEPS = (F.update_rank, F.update_col, F.update_row, F.flip_outer, F.flip_inner, F.descend, F.finish_scales)


@pytest.mark.parametrize("rank", [1, 5, 70, 300])
def test_no_step_raises_the_objective(weight, hessian, rank):
    hessian = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(len(hessian))
    factors = random_factors(*weight.shape, rank)
    last = start = objective(weight, hessian, factors)
    for _ in range(3):
        for step in STEPS:
            step(weight, hessian, factors)
            now = objective(weight, hessian, factors)
            assert now <= last * (1 + 1e-5), step.__name__
            last = now
    assert last < 0.99 * start
    for signs in (factors.outer, factors.inner):
        assert torch.equal(signs.abs(), torch.ones_like(signs))


@pytest.mark.parametrize("flip", [F.flip_outer, F.flip_inner])
def test_flips_find_planted_signs(flip):
    """Factors with a few wrong signs and the right scales get most of them back."""
    factors = random_factors(96, 96, 24)
    target = factors.reconstruction()
    hessian = torch.eye(96)
    signs = factors.outer if flip is F.flip_outer else factors.inner
    wrong = torch.rand(signs.shape, generator=torch.Generator().manual_seed(1)) < 0.01
    signs[wrong] *= -1
    before = objective(target, hessian, factors)
    flip(target, hessian, factors)
    assert objective(target, hessian, factors) < 0.2 * before  # 0 to 0.08 in 33 draws


def test_scales_of_a_dead_row_and_of_a_weight_of_zeros_are_finite():
    factors = random_factors(8, 16, 4)
    weight = torch.zeros(8, 16)
    for _ in range(2):
        F.descend(weight, torch.eye(16), factors)
    F.finish_scales(weight, torch.eye(16), factors)
    assert torch.equal(factors.reconstruction(), weight)
