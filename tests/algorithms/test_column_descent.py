import pytest
import torch

from optimum_arb.algorithms import column_descent as C


def problem(rows, columns, planes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    metric = inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(columns)
    row = torch.rand(planes, rows, generator=generator) + 0.2
    col = torch.rand(planes, columns, generator=generator) + 0.2
    signs = torch.where(torch.rand(planes, rows, columns, generator=generator) < 0.5, -1.0, 1.0)
    return weight, metric, row, col, signs


def values(signs, row, col):
    return torch.einsum("pnk,pn,pk->nk", signs, row, col)


def descend(weight, metric, row, col, signs):
    current = values(signs, row, col).T.contiguous()
    step = ((weight - current.T) @ metric).T / metric.diagonal()[:, None]
    return C.descend_columns(current, step.contiguous(), row, col, metric / metric.diagonal())


def objective(weight, metric, quantized):
    error = (weight - quantized).double()
    return float((error @ metric.double() * error).sum())


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 31, 100])
def test_the_objective_falls_and_the_signs_give_the_changes(planes, columns):
    weight, metric, row, col, signs = problem(17, columns, planes)
    before = values(signs, row, col)
    found, changes = descend(weight, metric, row, col, signs)
    after = values(found, row, col)
    torch.testing.assert_close(after - before, changes.T, rtol=1e-4, atol=1e-5)
    assert objective(weight, metric, after) < objective(weight, metric, before)
    again, changes = descend(weight, metric, row, col, found)
    assert objective(weight, metric, values(again, row, col)) <= objective(weight, metric, after) * (1 + 1e-6)


@pytest.mark.skipif(C.triton is None, reason="needs triton")
@pytest.mark.parametrize(("planes", "rows", "columns"), [(1, 33, 12), (2, 5, 12), (3, 5, 9)])
def test_the_kernel_does_as_the_loop(planes, rows, columns, monkeypatch):
    monkeypatch.setattr(C, "KERNEL_CHUNK", 16)  # the interpreter takes a second for a column of 64
    weight, metric, row, col, signs = problem(rows, columns, planes, seed=planes)
    current = values(signs, row, col).T.contiguous()
    step = (((weight - current.T) @ metric).T / metric.diagonal()[:, None]).contiguous()
    patterns = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * planes).view(-1, planes)
    ratio = metric / metric.diagonal()
    results = []
    for run in (C._loop, C._run_kernel):
        taken = torch.zeros(current.shape, dtype=torch.uint8)
        changes = torch.full_like(current, float("nan"))
        run(current, step.clone(), row, col, ratio, patterns, taken, changes)
        results.append((taken, changes))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("columns", [1, 33, 100])
def test_few_planes_do_as_many(planes, columns):
    """The loop over patterns, which serves any number of planes; scales of any sign, and either plane the larger."""
    weight, metric, row, col, signs = problem(17, columns, planes, seed=columns)
    generator = torch.Generator().manual_seed(3)
    row, col = (scale * torch.randn(scale.shape, generator=generator) for scale in (row, col))
    current = values(signs, row, col).T.contiguous()
    step = (((weight - current.T) @ metric).T / metric.diagonal()[:, None]).contiguous()
    ratio = metric / metric.diagonal()
    found, changes = C.descend_columns(current, step.clone(), row, col, ratio)
    patterns = C.sign_patterns(planes, row)
    taken = torch.zeros(current.shape, dtype=torch.uint8)
    expected = torch.full_like(current, float("nan"))
    C._loop(current, step, row, col, ratio, patterns, taken, expected)
    torch.testing.assert_close(changes, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, patterns[taken.long()].permute(2, 1, 0))
