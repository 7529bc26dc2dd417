import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from optimum_arb import ARBConfig
from optimum_arb.algorithms import admm, binarize, dbf, preparation
from optimum_arb.algorithms.shared_work import Part, SharedWork, once, share, sharing
from optimum_arb.spare_threads import spare_threads


def counted(monkeypatch, module, name):
    calls = []
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or function(*args))
    return calls


@pytest.mark.parametrize(
    "choices", [{}, {"planes": 2}, {"act_order": True}, {"method": "arb-rc"}, {"method": "arb-dbf"}], ids=str
)
def test_fits_of_one_matrix_share_its_factorizations_and_keep_their_bits(monkeypatch, choices):
    config = ARBConfig(**choices)
    inputs = torch.randn(300, 96)
    hessian = inputs.T @ inputs
    weights = [torch.randn(rows, 96) for rows in (40, 24, 64)]
    alone = [binarize(weight, hessian, config).dequantize() for weight in weights]
    factors = choices.get("method") == "arb-dbf"
    where = (dbf, "_of_unit_diagonal") if factors else (preparation, "prepare_hessian")
    prepared = counted(monkeypatch, *where)
    inverses = counted(monkeypatch, admm, "_inverse")
    work = SharedWork(hessian)

    def fit(weight):
        with torch.no_grad(), sharing(work):
            return binarize(weight, hessian, config).dequantize()

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(fit, weights))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len(prepared) == 1
    assert len(inverses) == (0 if choices.get("method") else admm.STAGES)


def test_threads_that_a_fit_has_to_spare_share_too(monkeypatch):
    inputs = torch.randn(300, 96)
    hessian, weight = inputs.T @ inputs, torch.randn(40, 96)
    inverses = counted(monkeypatch, admm, "_inverse")
    with torch.no_grad(), sharing(SharedWork(hessian)), spare_threads(1):
        one, other = (binarize(weight, hessian, ARBConfig()).dequantize() for _ in range(2))
    assert torch.equal(one, other)
    assert len(inverses) == admm.STAGES


def test_other_matrices_are_nobody_elses():
    shared, other = torch.eye(3), torch.eye(3)
    made = []

    def make():
        made.append(None)
        return len(made)

    work = SharedWork(shared)
    with sharing(work):
        assert [once(shared, "key", make) for _ in range(3)] == [1, 1, 1]
        assert once(shared, "another", make) == 2
        assert [once(other, "key", make) for _ in range(2)] == [3, 4]
        share(other)
        assert [once(other, "key", make) for _ in range(2)] == [5, 5]
    assert once(shared, "key", make) == 6  # outside nothing is kept
    with sharing(None):
        assert once(shared, "key", make) == 7


@pytest.mark.parametrize("uses", [None, 1, 2])
def test_what_was_made_elsewhere_is_kept_for_as_many_fits_as_use_it(uses):
    matrix, arrived = torch.eye(3), []
    part = Part(matrix, "key", lambda: "made here")
    work = SharedWork(torch.eye(2))
    work.put(part, "made elsewhere", uses, lambda: arrived.append(None))
    with sharing(work):
        found = [part.once() for _ in range(3)]
    here = 0 if uses is None else 3 - uses
    assert found == ["made elsewhere"] * (3 - here) + ["made here"] * here
    assert len(arrived) == 3 - here
    assert part.once() == "made here"


def test_an_error_is_not_kept():
    matrix, ready = torch.eye(2), threading.Event()

    def make():
        if not ready.is_set():
            ready.set()
            raise ValueError("not yet")
        return "made"

    with sharing(SharedWork(matrix)):
        with pytest.raises(ValueError, match="not yet"):
            once(matrix, "key", make)
        assert once(matrix, "key", make) == "made"


def test_made_once_by_several_threads():
    matrix, begin = torch.eye(3), threading.Barrier(8)
    work, calls = SharedWork(matrix), []

    def make():
        calls.append(None)
        return torch.zeros(2)

    def run(_):
        with sharing(work):
            begin.wait()
            return once(matrix, "key", make)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(8)))
    assert len(calls) == 1
    assert all(result is results[0] for result in results)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"admm_iterations": 0},
        {"admm_iterations": 0, "refinement_sweeps": 0, "scale_bits": 8},
        {"method": "arb-rc"},
        {"method": "arb-dbf"},
    ],
    ids=str,
)
def test_nothing_is_added_to_what_is_shared(choices):
    """Another fit, on a stream of its own, waits for what `once` made, not for what a fit adds to it later."""
    seen = []

    class Watched(SharedWork):
        def get(self, matrix, key, make):
            result = super().get(matrix, key, make)
            seen.append((result, set(getattr(result, "__dict__", ()))))
            return result

    inputs = torch.randn(300, 96)
    hessian = inputs.T @ inputs
    with sharing(Watched(hessian)):
        binarize(torch.randn(40, 96), hessian, ARBConfig(block_size=64, **choices))
    assert seen
    for result, attributes in seen:
        assert set(getattr(result, "__dict__", ())) == attributes
