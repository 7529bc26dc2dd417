"""Experts on an accelerator; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch
from tiny_experts import MOE, save_moe
from tiny_models import outputs, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, model_report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@pytest.mark.parametrize("data", ["data-free", "calibrated"])
@pytest.mark.parametrize("family", MOE)
def test_binarize_save_reload(tmp_path, family, data):
    source = save_moe(tmp_path / "float", family)
    config = ARBConfig(dataset=tokens(16, 32) if data == "calibrated" else None, num_samples=16, block_size=64)
    on_cpu = model_report(AutoModelForCausalLM.from_pretrained(source, quantization_config=config))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map=DEVICE.type)
    report = model_report(model)
    assert {p.device.type for p in model.parameters()} == {DEVICE.type}
    assert report.bits_per_weight == on_cpu.bits_per_weight
    assert [m.starved for m in report.modules] == [m.starved for m in on_cpu.modules]
    for here, there in zip(report.modules, on_cpu.modules, strict=True):
        # rounding flips a few signs; the fit is as good
        assert here.weight_error == pytest.approx(there.weight_error, rel=0.05)
    ids = tokens(2, 8).to(DEVICE)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=DEVICE.type)
    torch.testing.assert_close(outputs(again, ids), expected)
    on_the_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(outputs(on_the_cpu, ids.cpu()), expected.cpu(), rtol=1e-2, atol=1e-2)
