"""What fits under one calibration matrix share: made once, by the first, and whole when it is handed to another."""

from __future__ import annotations

import threading

import pytest
import torch

from optimum_arb import ARBConfig
from optimum_arb.algorithms import binarize, hessian
from optimum_arb.algorithms.shared_work import SharedWork, once, share, sharing

CHOICES = {
    "search": {"admm_iterations": 3},
    "block after block": {"admm_iterations": 0},
    "no sweeps": {"admm_iterations": 0, "refinement_sweeps": 0, "scale_bits": 8},
    "arb-rc": {"method": "arb-rc", "num_iterations": 1},
    "arb-dbf": {"method": "arb-dbf", "num_iterations": 2},
}


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, 192, generator=generator)
    return torch.randn(40, 192, generator=generator), inputs.T @ inputs


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_same_bits_with_and_without(choices):
    config = ARBConfig(block_size=64, **choices)
    _, metric = problem()
    work = SharedWork(metric)
    for seed in (1, 2):
        weight, _ = problem(seed)
        with sharing(work):
            together = binarize(weight, metric, config)
        assert torch.equal(together.dequantize(), binarize(weight, metric, config).dequantize())


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_nothing_is_added_to_what_is_shared(choices, monkeypatch):
    """Another fit, on a stream of its own, waits for what was made by `once`, not for what a fit adds to it later."""
    made = []
    prepare = hessian.prepare_hessian

    def prepared(*args):
        made.append(prepare(*args))
        return made[-1]

    monkeypatch.setattr("optimum_arb.algorithms.prepare_hessian", prepared)
    config = ARBConfig(block_size=64, **choices)
    weight, metric = problem()
    held = []

    class Watched(SharedWork):
        def get(self, matrix, key, make):
            result = super().get(matrix, key, make)
            held.append((result, set(getattr(result, "__dict__", ()))))
            return result

    with sharing(Watched(metric)):
        binarize(weight, metric, config)
    assert held
    for result, attributes in held:
        assert set(getattr(result, "__dict__", ())) == attributes
    assert len(made) <= 1


def test_made_once_by_several_threads():
    matrix = torch.eye(3)
    work = SharedWork(matrix)
    calls, results = [], []
    begin = threading.Barrier(8)

    def make():
        calls.append(threading.get_ident())
        return torch.zeros(2)

    def run():
        with sharing(work):
            begin.wait()
            results.append(once(matrix, "key", make))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 8
    assert all(result is results[0] for result in results)


def test_of_this_matrix_alone():
    matrix, other = torch.eye(3), torch.eye(3)
    with sharing(SharedWork(matrix)):
        first = once(matrix, "key", lambda: torch.zeros(2))
        assert once(matrix, "key", lambda: torch.ones(2)) is first
        assert once(matrix, "another", lambda: torch.ones(2)) is not first
        assert once(other, "key", lambda: torch.ones(2)) is not first
        share(other)
        second = once(other, "key", lambda: torch.ones(2))
        assert once(other, "key", lambda: torch.zeros(2)) is second
    assert once(matrix, "key", lambda: torch.ones(2)) is not first
