"""The fit on an accelerator against that on the CPU; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

from optimum_arb import ARBConfig
from optimum_arb.algorithms import binarize, output_error
from optimum_arb.algorithms.partition import large_weights, salient_columns
from optimum_arb.calibration.activations import Activations
from optimum_arb.calibration.correction import Corrections, Read, Step
from optimum_arb.calibration.statistics import Statistic, add_product

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
