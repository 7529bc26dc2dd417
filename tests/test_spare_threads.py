import threading

import pytest
import torch

from optimum_arb import spare_threads as module
from optimum_arb.algorithms import sign_terms
from optimum_arb.algorithms.admm import admm_planes
from optimum_arb.algorithms.dbf import binarize_factors
from optimum_arb.spare_threads import (
    Spare,
    add_product,
    ahead,
    in_parts,
    product,
    sharing_spare,
    spare_now,
    spare_threads,
)


@pytest.fixture(autouse=True)
def threads():
    """torch has as many threads after a test as before it."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def with_spare(counts, make):
    """What `make` returns with so many spare threads beside one."""
    torch.set_num_threads(1)
    found = []
    for spare in counts:
        with spare_threads(spare):
            found.append(make())
    return found


def random_inputs(rows, columns, samples):
    """A weight `[rows, columns]`, and X^T X of so many samples of its inputs."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(rows, columns, generator=generator), torch.randn(samples, columns, generator=generator)
    return weight, inputs.T @ inputs


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_results_come_in_order_of_one_thread_each(spare):
    with spare_threads(spare):
        found = list(ahead(lambda i: (i, torch.is_grad_enabled(), spare_now()), range(5)))
        assert not list(ahead(lambda i: i, []))
    assert [i for i, _, _ in found] == list(range(5))
    assert not any(grad for _, grad, _ in found)
    assert torch.is_grad_enabled()
    if spare:  # a thread that helps has no help
        assert {count for *_, count in found} == {0}


def test_the_next_task_is_under_way_while_the_last_result_is_used():
    begun = [threading.Event() for _ in range(3)]
    with spare_threads(1):
        for i in ahead(lambda i: (begun[i].set(), i)[1], range(3)):
            assert begun[min(i + 1, 2)].wait(10)


@pytest.mark.parametrize("spare", [0, 1])
def test_an_error_is_raised_where_its_result_is_wanted(spare):
    done = []
    with spare_threads(spare), pytest.raises(ZeroDivisionError):
        done.extend(ahead(lambda i: 1 // (2 - i), range(4)))
    assert spare_now() == 0


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_parts_come_in_order(spare):
    waiting = threading.Event()

    def task(i: int) -> tuple[int, bool]:
        if i == 0:  # so that others have the time to begin
            waiting.wait(0.1)
        return i, torch.is_grad_enabled()

    with spare_threads(spare):
        assert in_parts(task, range(7)) == [(i, False) for i in range(7)]
        assert in_parts(task, range(1)) == [(0, False)]


def test_parts_behind_a_long_task_of_the_spare_thread_are_done_without_it():
    held = threading.Event()
    with spare_threads(1):
        results = ahead(lambda i: held.wait(10) if i else i, range(2))
        assert next(results) == 0
        assert in_parts(lambda i: i, range(4)) == list(range(4))
        held.set()
        assert next(results) is True


@pytest.mark.parametrize(
    "shape", [(1, 5, 3), (383, 300, 300), (385, 64, 512), (768, 200, 111), (1000, 40, 300)], ids=str
)
def test_products_are_the_same_with_spare_threads(shape, monkeypatch):
    """Also of views that are transposed."""
    monkeypatch.setattr(module, "LEAST", 0)
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(inner, rows, generator=generator).T, torch.randn(columns, inner, generator=generator).T
    found = with_spare((0, 1, 3), lambda: product(left, right))
    torch.testing.assert_close(found[0], (left.double() @ right.double()).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])

    def added():
        total = torch.ones(rows, columns)
        add_product(total, left, right)
        return total

    found = with_spare((0, 1, 3), added)
    torch.testing.assert_close(found[0], 1 + (left.double() @ right.double()).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_threads_that_several_tasks_share():
    idle = [0]
    spare = Spare(2, lambda: idle[0])
    with sharing_spare(spare):
        assert spare_now() == 0
        steps = ahead(lambda i: (i, threading.current_thread().name), range(4))
        first = [next(steps), next(steps)]
        idle[0] = 5  # no more than there are
        assert spare_now() == 2
        rest = list(steps)
        idle[0] = -1
        assert spare_now() == 0
    spare.close()
    assert [i for i, _ in first + rest] == list(range(4))
    here = threading.current_thread().name
    assert {name for _, name in first} == {here}
    assert all(name.startswith("optimum_arb_spare") for _, name in rest)
    assert spare_now() == 0


def test_factors_are_the_same_with_a_spare_thread(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "LEAST", 0)
    weight, matrix = random_inputs(60, 70, 200)
    found = with_spare((0, 1), lambda: binarize_factors(weight, matrix, 50, 0.01, 8, 0).dequantize())
    assert torch.equal(*found)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("col_scale", [True, False])
def test_planes_are_the_same_with_spare_threads(planes, col_scale, monkeypatch):
    monkeypatch.setattr(sign_terms, "CHUNK", 5 * 384)  # five rows of the 24
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "LEAST", 0)
    weight, matrix = random_inputs(24, 320, 640)
    matrix = matrix / 640 + 0.01 * torch.eye(320)
    found = with_spare((0, 1, 3), lambda: admm_planes(weight, matrix, 128, planes, 9, col_scale))
    for alone, *helped in zip(*found, strict=True):
        for other in helped:
            assert torch.equal(alone.signs, other.signs)
            assert torch.equal(alone.row, other.row)
            assert torch.equal(alone.col, other.col)
