import pytest
import torch

from optimum_arb.algorithms.normal_equations import _of_few, solve


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_systems_of_a_few_unknowns(size):
    """What a GPU takes gives what torch's solver does."""
    root = torch.randn(50, size, size + 2, dtype=torch.float64)
    normal, slope = root @ root.mT, torch.randn(50, size, dtype=torch.float64)
    ridge = torch.full((50, 1), 0.1, dtype=torch.float64)
    expected = torch.linalg.solve(normal + 0.1 * torch.eye(size, dtype=torch.float64), slope)
    torch.testing.assert_close(_of_few(normal, slope, ridge), expected, rtol=1e-9, atol=1e-9)


def test_a_system_that_is_not_positive_definite_is_told_by_nan():
    normal = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    step = _of_few(normal, torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert torch.isnan(step).all()


@pytest.mark.parametrize("size", [1, 2, 300])
def test_solutions_and_no_step_where_there_is_none(size):
    root = torch.randn(size, 3 * size + 5, dtype=torch.float64)
    normal, slope = root @ root.T, torch.randn(size, dtype=torch.float64)
    expected = torch.linalg.solve(normal, slope)
    torch.testing.assert_close(solve(normal[None], slope[None])[0], expected, rtol=1e-4, atol=1e-6)
    bad = -torch.eye(size, dtype=torch.float64)[None]
    if size > 1:
        assert torch.equal(solve(bad, slope[None]), torch.zeros(1, size, dtype=torch.float64))
    nothing = torch.zeros(1, size, size, dtype=torch.float64)
    assert torch.equal(solve(nothing, torch.zeros(1, size, dtype=torch.float64)), torch.zeros(1, size).double())
