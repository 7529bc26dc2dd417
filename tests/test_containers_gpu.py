"""Factors, 8-bit scales and Hadamard transforms on an accelerator; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, model_report
from optimum_arb.algorithms import binarize, output_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
CHOICES = {
    "factors": {"method": "arb-dbf", "factor_bits": 2.0, "num_iterations": 10},
    "factors, 8-bit scales": {"method": "arb-dbf", "factor_bits": 2.0, "num_iterations": 10, "scale_bits": 8},
    "Hadamard": {"hadamard": 128, "block_size": 64, "planes": 2},
    "8-bit scales": {"scale_bits": 8, "block_size": 64},
    "refined": {"refine": "block", "refine_steps": 8, "batch_size": 4, "block_size": 64},
    "refined factors": {"method": "arb-dbf", "factor_bits": 2.0, "refine": "model", "refine_steps": 8, "batch_size": 4},
}


@pytest.mark.parametrize("name", CHOICES)
def test_binarized_on_the_gpu_it_runs_there_as_on_the_cpu(tmp_path, name):
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(16, 32), num_samples=16, **CHOICES[name])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map=DEVICE.type)
    assert {p.device.type for p in model.parameters()} == {DEVICE.type}
    assert model_report(model).mean_output_error < 0.9
    ids = tokens(2, 16, seed=1)
    expected = outputs(model, ids.to(DEVICE))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=DEVICE.type)
    torch.testing.assert_close(outputs(again, ids.to(DEVICE)), expected)
    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(outputs(on_cpu, ids), expected.cpu(), rtol=1e-2, atol=1e-2)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16, device_map=DEVICE.type)
    for length in (1, 16):  # the kernel for few tokens, and the one for many
        found, wanted = outputs(half, ids[:, :length].to(DEVICE)).float().cpu(), outputs(on_cpu, ids[:, :length])
        assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (3, 576), (70, 1000), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hadamard_transform_is_that_of_the_cpu(rows, columns, block, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    weight = torch.randn(64, columns, generator=generator)
    config = ARBConfig(hadamard=block, block_size=-1)
    from optimum_arb.nn import ARBLinear

    layer = ARBLinear.from_binarized(binarize(weight, torch.eye(columns), config))
    expected = layer(x.float())
    found = layer.to(DEVICE)(x.to(DEVICE)).float().cpu()
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("choices", [{"method": "arb-dbf"}, {"planes": 1}, {"planes": 2}, {"hadamard": 128}], ids=str)
def test_a_fit_on_the_gpu_is_as_good_as_on_the_cpu(choices):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 320, generator=generator)
    inputs = torch.randn(900, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    hessian, config = inputs.T @ inputs, ARBConfig(**choices)
    errors = [
        output_error(weight, binarize(weight.to(device), hessian.to(device), config).dequantize().cpu(), hessian)
        for device in ("cpu", DEVICE)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
