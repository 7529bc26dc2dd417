"""Adapters on packed layers are merged: refused, exactly into float weights, or into packed bits anew."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import outputs, text, tokens

from optimum_arb import ARBLinear, model_report

peft = pytest.importorskip("peft")

from adapters import IDS, load, lora, packed_tensors, randomize  # noqa: E402

from optimum_arb.integrations.peft import merge_dequantized, merge_rebinarized  # noqa: E402


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "safe"])
def test_merging_into_packed_bits_is_refused_before_anything_is_merged(packed_llama, how):
    """The first layer is a float one: PEFT alone would have merged it before it failed at the second."""
    model = peft.get_peft_model(load(packed_llama), lora())
    randomize(model)
    expected = outputs(model, IDS)
    with pytest.raises(ValueError, match=r"merge_dequantized\(model\).*merge_rebinarized\(model\)"):
        model.merge_and_unload(safe_merge=True) if how == "safe" else getattr(model, how)()
    assert torch.equal(outputs(model, IDS), expected)


def test_adapters_that_multiply_the_weight_are_not_merged_either(packed_llama):
    config = peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(load(packed_llama), config)
    before = packed_tensors(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    expected = outputs(model, IDS)
    assert not torch.equal(expected, outputs(load(packed_llama), IDS))
    with pytest.raises(ValueError, match="merge_dequantized"):
        model.merge_and_unload()
    assert all(torch.equal(before[name], tensor) for name, tensor in packed_tensors(model).items())
    torch.testing.assert_close(outputs(merge_dequantized(model), IDS), expected, rtol=1e-4, atol=1e-4)


def adapted(path, how: str):
    """A model with a random adapter: PEFT's wrapper, or transformers' own model."""
    model = load(path)
    if how == "get_peft_model":
        model = peft.get_peft_model(model, lora())
    else:
        model.add_adapter(lora())
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_merge_dequantized_is_exact(packed_family, tmp_path, how):
    model = adapted(packed_family, how)
    expected = outputs(model, IDS)
    merged = merge_dequantized(model)
    assert type(merged) is type(load(packed_family))
    assert not any(isinstance(m, (ARBLinear, peft.tuners.tuners_utils.BaseTunerLayer)) for m in merged.modules())
    torch.testing.assert_close(outputs(merged, IDS), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(outputs(load(tmp_path), IDS), outputs(merged, IDS))


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("data", ["data-free", "tokens", "text"])
def test_merge_rebinarized(packed_family, tmp_path, how, data):
    exact = outputs(merge_dequantized(adapted(packed_family, how)), IDS)
    without = outputs(load(packed_family), IDS)
    dataset = {"data-free": None, "tokens": tokens(32, 20), "text": [text(640)]}[data]
    model = adapted(packed_family, how)
    merged, report = merge_rebinarized(model, dataset=dataset, num_samples=32, sequence_length=20)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in merged.modules())
    names = [name for name, module in merged.named_modules() if isinstance(module, ARBLinear)]
    assert [module.name for module in report.modules] == names
    assert report.calibrated == (data != "data-free")
    assert all(0 < module.error <= module.error_without_adapter for module in report.modules)
    assert any(module.rebinarized for module in report.modules)
    assert report.mean_error < report.mean_error_without_adapter
    assert f"{report.mean_error:.4f}" in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["calibrated"] == report.calibrated
    assert {m.name: m.output_error or m.weight_error for m in model_report(merged).modules} == {
        m.name: pytest.approx(m.error) for m in report.modules
    }
    result = outputs(merged, IDS)
    assert (result - exact).square().mean() < (without - exact).square().mean()
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(outputs(again, IDS), result)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["bits_per_weight"] == model_report(again).bits_per_weight
    assert saved["calibration"]["sequence_length"] == (24 if data == "data-free" else 20)


def test_merge_rebinarized_changes_nothing_where_the_adapter_does_not(packed_family):
    model = peft.get_peft_model(load(packed_family), lora())  # as PEFT makes it: B is zero
    expected = outputs(load(packed_family), IDS)
    merged, report = merge_rebinarized(model)
    assert torch.equal(outputs(merged, IDS), expected)
    assert not any(module.rebinarized for module in report.modules)
    assert f"{len(report.modules)} layers stayed" in report.summary()


def test_float_layers_and_chosen_adapters_are_merged_too(packed_llama):
    model = peft.get_peft_model(load(packed_llama), lora(), adapter_name="first")
    model.add_adapter("second", lora(modules_to_save=["lm_head"]))
    randomize(model)
    model.set_adapter("second")
    expected = outputs(model, IDS)
    model.set_adapter("first")
    torch.testing.assert_close(
        outputs(merge_dequantized(model, adapter_names="second"), IDS), expected, rtol=1e-4, atol=1e-4
    )
    model = peft.get_peft_model(load(packed_llama), lora(target_modules=["q_proj", "lm_head"]))
    randomize(model)
    deltas = [m.get_delta_weight("default") for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    merged, report = merge_rebinarized(model)
    assert [module.name for module in report.modules] == ["model.layers.1.self_attn.q_proj"]
    original = load(packed_llama)
    torch.testing.assert_close(
        merged.model.layers[0].self_attn.q_proj.weight,
        original.model.layers[0].self_attn.q_proj.weight + deltas[0],
    )
    torch.testing.assert_close(merged.lm_head.weight, original.lm_head.weight + deltas[-1])


def test_errors_of_merging(packed_llama):
    with pytest.raises(ValueError, match="has no adapter to merge"):
        merge_dequantized(load(packed_llama))
    with pytest.raises(ValueError, match="has no adapter to merge"):
        merge_rebinarized(load(packed_llama))
    model = peft.get_peft_model(load(packed_llama), lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="No packed layer has an adapter"):
        merge_rebinarized(model)
    with pytest.raises(ValueError, match="no adapter 'other': the model has default"):
        merge_rebinarized(model, adapter_names="other")
    prompt = peft.get_peft_model(
        load(packed_llama), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="learned prompt"):
        merge_dequantized(prompt)
    multiplied = peft.get_peft_model(
        load(packed_llama), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="only plain LoRA"):
        merge_rebinarized(multiplied)
