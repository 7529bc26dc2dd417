"""Binarizing and loading on an accelerator; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, model_report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]
FAMILIES = ("LlamaForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM")
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def binarize(path, data, **kwargs):
    dataset = tokens(16, 32) if data == "calibrated" else None
    config = ARBConfig(dataset=dataset, num_samples=16, block_size=64)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **kwargs)


@pytest.mark.parametrize("data", ["data-free", "calibrated"])
@pytest.mark.parametrize("device_map", ["device", "auto", {"": 0}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_binarize_save_reload(tmp_path, family, device_map, data):
    source = save_tiny(tmp_path / "float", family)
    device_map = DEVICE.type if device_map == "device" else device_map
    on_cpu = model_report(binarize(source, data))
    model = binarize(source, data, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {DEVICE.type}
    report = model_report(model)
    assert report.bits_per_weight == on_cpu.bits_per_weight
    if data == "calibrated":
        # rounding flips a few signs; the fit is as good
        assert report.mean_output_error == pytest.approx(on_cpu.mean_output_error, rel=0.05)
    for here, there in zip(report.modules, on_cpu.modules, strict=True):
        assert here.weight_error == pytest.approx(there.weight_error, rel=0.2)
    ids = tokens(2, 16, seed=1).to(DEVICE)
    expected = outputs(model, ids)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=device_map)
    assert torch.equal(outputs(again, ids), expected)
    answer = again.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[0] == 2
    assert answer.shape[1] > 16


@pytest.mark.parametrize("data", ["data-free", "calibrated", "packed"])
def test_a_model_split_over_accelerator_and_cpu(tmp_path, data):
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM")
    if data == "packed":
        binarize(source, "calibrated").save_pretrained(tmp_path / "packed")
        expected = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tokens(2, 16))
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    device_map = {**dict.fromkeys(names, 0), "model.layers.1": "cpu"}
    if data == "packed":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=device_map)
    else:
        model = binarize(source, data, device_map=device_map)
    assert model.hf_device_map == device_map
    result = outputs(model, tokens(2, 16).to(DEVICE)).cpu()
    assert torch.isfinite(result).all()
    if data == "packed":
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="is offloaded"):
        model.dequantize()
