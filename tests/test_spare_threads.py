import threading

import pytest
import torch

from optimum_arb.algorithms.admm import admm_planes
from optimum_arb.spare_threads import ahead, spare_now, spare_threads


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_results_come_in_order_of_one_thread_each(spare):
    threads = torch.get_num_threads()
    try:
        with spare_threads(spare):
            found = list(ahead(lambda i: (i, torch.is_grad_enabled(), spare_now()), range(5)))
            assert not list(ahead(lambda i: i, []))
        assert [i for i, _, _ in found] == list(range(5))
        assert not any(grad for _, grad, _ in found)
        assert torch.is_grad_enabled()
        if spare:  # a thread that helps has no help
            assert {count for *_, count in found} == {0}
    finally:
        torch.set_num_threads(threads)


def test_the_next_task_is_under_way_while_the_last_result_is_used():
    threads = torch.get_num_threads()
    begun = [threading.Event() for _ in range(3)]
    try:
        with spare_threads(1):
            for i in ahead(lambda i: (begun[i].set(), i)[1], range(3)):
                assert begun[min(i + 1, 2)].wait(10)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("spare", [0, 1])
def test_an_error_is_raised_where_its_result_is_wanted(spare):
    threads = torch.get_num_threads()
    done = []
    try:
        with spare_threads(spare), pytest.raises(ZeroDivisionError):
            done.extend(ahead(lambda i: 1 // (2 - i), range(4)))
        assert spare_now() == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("col_scale", [True, False])
def test_planes_are_the_same_with_a_spare_thread(planes, col_scale):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 320, generator=generator), torch.randn(640, 320, generator=generator)
    matrix = inputs.T @ inputs / 640 + 0.01 * torch.eye(320)
    threads = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(1)
        for spare in (0, 1):
            with spare_threads(spare):
                found.append(admm_planes(weight, matrix, 128, planes, 9, col_scale))
    finally:
        torch.set_num_threads(threads)
    for alone, helped in zip(*found, strict=True):
        assert torch.equal(alone.signs, helped.signs)
        assert torch.equal(alone.row, helped.row)
        assert torch.equal(alone.col, helped.col)
