"""The fit on an accelerator against that on the CPU; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import pytest
import torch

from optimum_arb import ARBConfig
from optimum_arb.algorithms import binarize, output_error
from optimum_arb.algorithms.admm import _inverse
from optimum_arb.algorithms.cuda_graph import Replayed
from optimum_arb.algorithms.partition import large_weights, salient_columns
from optimum_arb.algorithms.shared_work import SharedWork, sharing
from optimum_arb.calibration.activations import INPUTS, Activations, CopiedAhead
from optimum_arb.calibration.correction import Corrections
from optimum_arb.calibration.reading import Read, Step
from optimum_arb.calibration.statistics import Statistic, add_product
from optimum_arb.calibration.workers import in_order

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 320, generator=generator) * torch.rand(320, generator=generator).mul(2).exp()
    inputs = torch.randn(1024, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    return weight, inputs.T @ inputs


def test_the_searches_choose_as_on_the_cpu(problem):
    block = problem[0][:, :128]
    assert torch.equal(
        salient_columns(block.square().cuda(), "search").cpu(), salient_columns(block.square(), "search")
    )
    for order in (1, 2):
        found = large_weights(block.cuda(), block.abs().cuda(), order)
        assert torch.equal(found.cpu(), large_weights(block, block.abs(), order))


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "arb-rc"},
        {"method": "arb-rc", "group_bitmap": "none"},
        {"method": "billm"},
        {},
        {"planes": 2},
        {"admm_iterations": 0, "refinement_sweeps": 2},
        {"scale_bits": 8},
        {"method": "arb-dbf"},
    ],
    ids=str,
)
def test_as_good_as_on_the_cpu(problem, choices):
    weight, hessian = problem
    config = ARBConfig(**choices)
    on_cpu = output_error(weight, binarize(weight, hessian, config).dequantize(), hessian)
    found = binarize(weight.cuda(), hessian.cuda(), config).dequantize().cpu()
    assert output_error(weight, found, hessian) == pytest.approx(on_cpu, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_inputs_in_16_bits(dtype):
    inputs = torch.randn(3, 500, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistic = Statistic(192, torch.device("cuda"))
    statistic.add(inputs.cuda())
    rows = inputs.reshape(-1, 192).double()
    torch.testing.assert_close(statistic.hessian.cpu().double(), rows.T @ rows, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_a_factor_in_float32(dtype):
    """In bfloat16 its rounding shows, of 2^-9."""
    left = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    right = torch.randn(500, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    total = torch.zeros(64, 96, dtype=torch.float64, device="cuda")
    add_product(total, left.cuda(), right.cuda())
    expected = left.double().T @ right.double()
    scale = float(expected.square().mean().sqrt())
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert float((total.cpu() - expected).square().mean().sqrt()) < bound * scale


def test_error_correction_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(4, 200, 48, generator=generator)
    wanted = given + 0.1 * torch.randn(4, 200, 48, generator=generator)
    weights = {"a": torch.randn(80, 48, generator=generator), "b": torch.randn(30, 48, generator=generator)}
    found = {}
    for device in ("cpu", "cuda"):
        modules = {name: torch.nn.Linear(48, len(weight), bias=False) for name, weight in weights.items()}
        for name, module in modules.items():
            module.weight.data = weights[name].to(device)
        corrections = Corrections(Step(["a", "b"]), modules, torch.device(device))
        statistic = Statistic(48, torch.device(device))
        for index in range(4):
            x = given[index].to(device)
            corrections.add(corrections.differences(Read(wanted[index].to(device)), Read(x)), x)
            statistic.add(x)
        corrections.solve(["a", "b"], statistic.hessian, 0.75)
        found[device] = {name: corrections.corrected(name).weight.cpu() for name in modules}
    for name, weight in weights.items():
        torch.testing.assert_close(found["cuda"][name], found["cpu"][name], rtol=1e-4, atol=1e-4)
        assert float((found["cpu"][name] - weight).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "choices",
    [
        {"refinement_sweeps": 3},
        {"planes": 2, "refinement_sweeps": 3},
        {"planes": 3, "refinement_sweeps": 3, "col_scale": False},
        {"scale_bits": 8, "hadamard": 64},
        {"method": "arb-dbf"},
    ],
    ids=str,
)
def test_a_graph_gives_the_bits_of_its_operators(problem, choices, monkeypatch):
    weight, hessian = (tensor.cuda() for tensor in problem)
    config = ARBConfig(**choices)
    graphs: list[Replayed] = []
    make = Replayed.__init__

    def made(self, *args):
        make(self, *args)
        graphs.append(self)

    monkeypatch.setattr(Replayed, "__init__", made)
    found = binarize(weight, hessian, config).dequantize()
    assert any(graph.recorded for graph in graphs)
    assert not any(graph._plain for graph in graphs)
    monkeypatch.setattr(Replayed, "__call__", lambda self: self._function())
    assert torch.equal(found, binarize(weight, hessian, config).dequantize())


def test_what_cannot_be_recorded_runs_as_it_is():
    total = torch.zeros(8, device="cuda")

    def add() -> None:
        total.add_(float(total.sum()) + 1)  # the host waits for the sum

    run = Replayed(add, total.device)
    for _ in range(3):
        run()
    assert not run.recorded
    assert total.tolist() == [91.0] * 8  # 1, 10, 91
    assert torch.isfinite(torch.randn(8, device="cuda")).all()


def test_graphs_recorded_by_several_threads():
    """On the streams of fits, where the other threads wait for theirs and take memory meanwhile."""

    def step(total: torch.Tensor, eye: torch.Tensor) -> None:
        total.copy_(torch.linalg.cholesky_ex(total @ total.T + eye)[0])

    def task(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        total = torch.randn(64, 64, generator=generator).cuda()
        eye = torch.eye(64).cuda()
        run = Replayed(lambda: step(total, eye), total.device)
        for _ in range(20):
            run()
        return total.cpu()

    def plain(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        total = torch.randn(64, 64, generator=generator).cuda()
        eye = torch.eye(64).cuda()
        for _ in range(20):
            step(total, eye)
        return total.cpu()

    found = list(in_order(task, list(range(12)), torch.device("cuda"), 4, 4))
    assert all(torch.equal(found[seed], plain(seed)) for seed in range(12))


def test_graphs_leave_no_memory(problem):
    """1.5 GB a layer of a 7B stayed where a cycle of references held them."""
    weight, hessian = (tensor.cuda() for tensor in problem)
    configs = [ARBConfig(refinement_sweeps=3), ARBConfig(planes=2), ARBConfig(method="arb-dbf")]
    held = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            for config in configs:
                binarize(weight, hessian, config)
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert held[1:] == held[1:2] * 3


def test_random_numbers_after_a_fit_of_two_planes(problem):
    """A CUDA graph that could not be captured left the generator unusable."""
    binarize(problem[0].cuda(), problem[1].cuda(), ARBConfig(planes=2, refinement_sweeps=3))
    assert torch.isfinite(torch.randn(8, device="cuda")).all()


def test_hidden_states_come_back_from_page_locked_memory():
    kept = Activations()
    first = [torch.randn(1, 16, 32, device="cuda") for _ in range(3)]
    for batch, hidden in enumerate(first):
        kept.put(batch, hidden)
    assert all(kept[batch].is_pinned() for batch in range(3))
    places = [kept[batch].data_ptr() for batch in range(3)]
    for batch, hidden in enumerate(first):
        assert torch.equal(kept[batch].cuda(), hidden)
        kept.put(batch, -hidden)
    kept.advance("layer")
    assert [kept[batch].data_ptr() for batch in range(3)] == places
    assert all(torch.equal(kept[batch], -hidden.cpu()) for batch, hidden in enumerate(first))


def test_what_enters_the_first_layer_is_page_locked_and_may_be_shared():
    kept = Activations(torch.device("cuda"))
    inputs = [torch.randn(1, 16, 32) for _ in range(3)]
    for batch, hidden in enumerate(inputs):
        kept.put(2 * batch, hidden)
        kept.put(2 * batch + 1, kept[2 * batch])
    kept.advance(INPUTS)
    assert all(kept[batch].is_pinned() for batch in range(6))
    assert all(kept[2 * batch].data_ptr() == kept[2 * batch + 1].data_ptr() for batch in range(3))
    for batch, hidden in enumerate(inputs):
        kept.put(2 * batch, hidden.cuda() + 1)
    for batch, hidden in enumerate(inputs):
        assert torch.equal(kept[2 * batch + 1], hidden)
        kept.put(2 * batch + 1, hidden.cuda() + 2)
    kept.advance("layer")
    for batch, hidden in enumerate(inputs):
        assert torch.equal(kept[2 * batch], hidden + 1)
        assert torch.equal(kept[2 * batch + 1], hidden + 2)


@pytest.mark.parametrize(
    "choices", [{}, {"planes": 2, "hadamard": 64, "scale_bits": 8}, {"method": "arb-dbf"}], ids=str
)
def test_fits_on_streams_of_their_own_make_the_same_bits(problem, choices):
    config = ARBConfig(**choices)
    weights = [(problem[0] + 0.01 * index).cuda() for index in range(10)]
    hessian = problem[1].cuda()

    def fit(index):
        return binarize(weights[index], hessian, config).dequantize()

    alone = list(in_order(fit, range(10), torch.device("cuda")))
    together = list(in_order(fit, range(10), torch.device("cuda"), streams=4))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


OTHER_STREAMS = """
import json, sys
import torch
from optimum_arb import ARBConfig
from optimum_arb.algorithms import binarize

generator = torch.Generator().manual_seed(0)
weight = (torch.randn(384, 320, generator=generator) * torch.rand(320, generator=generator).mul(2).exp()).cuda()
inputs = torch.randn(1024, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
hessian, config = (inputs.T @ inputs).cuda(), ARBConfig(**json.loads(sys.argv[1]))
expected = binarize(weight, hessian, config).dequantize()
torch.cuda.synchronize()
for _ in range(4):
    with torch.cuda.stream(torch.cuda.Stream()):
        found = binarize(weight, hessian, config).dequantize()
    torch.cuda.synchronize()
    assert torch.equal(found, expected), "other bits on another stream"
"""


@pytest.mark.parametrize("choices", [{}, {"planes": 2}, {"method": "arb-rc"}, {"method": "arb-dbf"}], ids=str)
def test_the_same_bits_on_all_streams_where_deterministic_algorithms_are_asked_for(choices):
    """The variable counts from the first call of cuSOLVER in a process, which has a workspace for each stream then."""
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", OTHER_STREAMS, json.dumps(choices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("choices", [{}, {"planes": 2}, {"method": "arb-rc"}, {"method": "arb-dbf"}], ids=str)
@pytest.mark.parametrize("streams", [1, 3])
def test_fits_that_share_a_matrix_make_the_same_bits(problem, choices, streams):
    config = ARBConfig(**choices)
    weights = [(problem[0] + 0.01 * index).cuda() for index in range(6)]
    hessian = problem[1].cuda()
    work = SharedWork(hessian)

    def fit(index):
        with sharing(work):
            return binarize(weights[index], hessian, config).dequantize()

    together = list(in_order(fit, range(6), torch.device("cuda"), streams=streams))
    assert work._entries
    alone = [binarize(weight, hessian, config).dequantize() for weight in weights]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_an_error_on_a_stream_is_raised_once_the_others_ended():
    def task(index):
        if index == 2:
            raise ValueError("of task 2")
        return torch.full((1000,), float(index), device="cuda").sum()

    with pytest.raises(ValueError, match="of task 2"):
        list(in_order(task, range(8), torch.device("cuda"), streams=3))
    found = list(in_order(lambda index: task(index + 3), range(8), torch.device("cuda"), streams=3))
    assert [float(value) for value in found] == [1000.0 * (index + 3) for index in range(8)]


def test_hidden_states_are_copied_ahead():
    kept = Activations()
    first = [torch.randn(1, 64, 256, device="cuda") for _ in range(6)]
    for batch, hidden in enumerate(first):
        kept.put(batch, hidden)
    kept.advance("")
    ahead = CopiedAhead(kept, 6, torch.device("cuda"))
    for order in (range(6), (3, 1, 2, 3, 0), range(6)):
        for batch in order:
            hidden = ahead[batch]
            kept.put(batch, hidden + 1)  # as a layer's outputs take the place of its inputs
            assert torch.equal(hidden, first[batch])
            first[batch] = first[batch] + 1
    kept.advance("layer")
    assert all(torch.equal(kept[batch].cuda(), hidden) for batch, hidden in enumerate(first))


def test_copies_run_beside_what_computes():
    """Nothing waits for the host here: what is read, computed and written in its place is kept in order by events."""
    kept = Activations(torch.device("cuda"))
    batches, layers = 24, 4
    for batch in range(batches):
        kept.put(batch, torch.full((2048, 2048), float(batch)))
    kept.advance(INPUTS)
    slow = torch.randn(4096, 4096, device="cuda")
    for layer in range(layers):
        ahead = CopiedAhead(kept, batches, torch.device("cuda"))
        for batch in range(batches):
            hidden = ahead[batch]
            if batch % 5 == layer:
                slow = torch.tanh(slow @ slow)  # some batches take longer than their copies, others less
            kept.put(batch, hidden * 2 + slow[0, 0] * 0 + layer)
        kept.advance("layer")
    for batch in range(batches):
        expected = float(batch)
        for layer in range(layers):
            expected = expected * 2 + layer
        assert bool((kept[batch] == expected).all()), batch


@pytest.mark.parametrize("size", [500, 3000])
def test_the_inverse_of_a_calibration_matrix(size):
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    matrix = rows.T @ rows / len(rows)
    matrix.diagonal().add_(0.1)
    inverse = _inverse(matrix.cuda()).cpu().double()
    expected = torch.linalg.inv(matrix.double())
    # its factor is rounded to bfloat16, by up to 2^-9
    assert float((inverse - expected).norm() / expected.norm()) < 2**-8
