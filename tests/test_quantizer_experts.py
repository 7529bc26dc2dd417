"""What a user sees of experts through transformers: choices, reports, files, errors."""

from __future__ import annotations

import json

import pytest
import torch
from binarized_experts import LAYER, binarize, save_packed
from safetensors.torch import load_file, save_file
from tiny_experts import save_moe, tiny_moe
from tiny_models import outputs, tokens
from transformers import AutoModel, AutoModelForCausalLM

from optimum_arb import ARBConfig, ARBExperts, model_report
from optimum_arb.calibration import CalibrationWalk, token_batches
from optimum_arb.inspection import inspect_model
from optimum_arb.modules import select_modules


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("mixtral"), "MixtralForCausalLM")


@pytest.fixture(scope="module")
def packed(mixtral, tmp_path_factory):
    return save_packed(mixtral, tmp_path_factory.mktemp("packed"))


# Choices


def test_overrides_per_layer_and_matrix(mixtral, tmp_path):
    overrides = {
        "experts.down_proj": {"planes": 2},
        r"re:model\.layers\.0\.mlp\.experts": {"method": "rtn", "planes": 1},
        "1.mlp.experts.gate_up_proj": {"skip": True},
    }
    model = binarize(mixtral, method="arb-hrc", overrides={**overrides}, modules_to_not_convert=["k_proj"])
    found = {m.name: (m.method, m.layout) for m in model_report(model).modules if m.experts}
    assert found == {
        f"{LAYER.format(0)}.gate_up_proj": ("rtn", "planes-1"),
        f"{LAYER.format(0)}.down_proj": ("rtn", "planes-1"),
        f"{LAYER.format(1)}.down_proj": ("arb-hrc", "planes-2-col"),
    }
    kept = model_report(model).kept
    assert kept[f"{LAYER.format(1)}.gate_up_proj"] == "overrides: skip"
    assert model.get_parameter(f"{LAYER.format(1)}.gate_up_proj").dtype == torch.float32
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts.3"
    assert stored[f"{prefix}.w1.weight"].dtype == torch.float32
    assert stored[f"{prefix}.w2.weight"].dtype == torch.uint8
    ids = tokens(1, 8)
    for family in (AutoModelForCausalLM, AutoModel):
        again = family.from_pretrained(tmp_path)
        expected = model if family is AutoModelForCausalLM else model.model
        assert torch.equal(outputs(again, ids), outputs(expected, ids))


def test_experts_may_stay_in_float_altogether(mixtral, tmp_path):
    model = binarize(mixtral, modules_to_not_convert=["experts"], dataset=tokens(), num_samples=4)
    assert not any(isinstance(module, ARBExperts) for module in model.modules())
    kept = model_report(model).kept
    assert kept[f"{LAYER.format(0)}.down_proj"] == "modules_to_not_convert: 'experts'"
    model.save_pretrained(tmp_path)
    ids = tokens(1, 8)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path), ids), outputs(model, ids))


def test_only_the_experts_may_be_binarized(mixtral, tmp_path):
    model = binarize(mixtral, modules_to_not_convert=["re:.*self_attn.*"])
    assert all(module.experts == 4 for module in model_report(model).modules)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_report(again).kept.keys() == model_report(model).kept.keys()
    assert len(model_report(again).modules) == 4


def test_a_pattern_that_matches_nothing(mixtral):
    with pytest.raises(ValueError, match=r"'experts.w1' matches none .* gate_up_proj"):
        binarize(mixtral, overrides={"experts.w1": {"block_size": 128}})


@pytest.mark.parametrize(
    ("method", "data"),
    [("billm", "data-free"), ("arb", "calibrated"), ("arb-x", "calibrated"), ("arb-rc", "data-free")],
)
def test_every_method_of_the_literature(mixtral, tmp_path, method, data):
    choices = {"dataset": tokens(), "num_samples": 4} if data == "calibrated" else {}
    model = binarize(mixtral, method=method, num_iterations=2, **choices)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 8)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path), ids), outputs(model, ids))
    assert "salient" in str(model.state_dict().keys())


def test_what_transformers_converts_in_other_ways_is_reported(mixtral, monkeypatch):
    from transformers.core_model_loading import Transpose, WeightConverter

    from optimum_arb.experts import keys

    odd = WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", operations=[Transpose(1, 2)])
    monkeypatch.setattr(keys, "get_model_conversion_mapping", lambda model: [odd])
    selection = select_modules(tiny_moe("MixtralForCausalLM"), ARBConfig(dataset=None))
    assert f"{LAYER.format(0)}.gate_up_proj" in selection.convert
    reason = selection.keep[f"{LAYER.format(0)}.down_proj"]
    assert reason == "transformers converts its checkpoint by Transpose: not supported"


# Calibration


def test_the_walk_gives_experts_the_inputs_of_the_binarized_prefix():
    """Layer 1's experts see what layer 0 makes of the tokens once its weights are halved, attention's included."""
    model = tiny_moe("MixtralForCausalLM")
    found = {}

    def halve(name, module, *rest):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        if name.endswith("experts"):
            found[name] = rest[0]
            return module, [0.5]
        return module, None

    names = select_modules(model, ARBConfig(dataset=None)).modules()
    assert names.count(LAYER.format(0)) == 1
    CalibrationWalk(model, names, halve, token_batches(tokens(5, 24), 2), binarize_experts=halve).run()

    plain = tiny_moe("MixtralForCausalLM")
    inputs = []
    with torch.no_grad():
        for name in names:
            if ".layers.0." in name:
                for parameter in plain.get_submodule(name).parameters():
                    parameter.mul_(0.5)
        handle = plain.get_submodule(LAYER.format(1)).register_forward_pre_hook(lambda m, args: inputs.append(args[:2]))
        for batch in token_batches(tokens(5, 24), 2):
            plain(input_ids=batch)
        handle.remove()
    x, index = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    routed = found[LAYER.format(1)]
    assert sum(routed.tokens()) == 5 * 24 * 2
    for expert in range(4):
        torch.testing.assert_close(routed.rows(expert), x[(index == expert).any(1)])


def test_starved_experts_in_the_report(mixtral, monkeypatch, caplog):
    from optimum_arb.experts import conversion

    monkeypatch.setattr(conversion, "STARVED_TOKENS", 60)
    with caplog.at_level("INFO", logger="optimum_arb"):
        model = binarize(mixtral, method="arb-hrc", dataset=tokens(), num_samples=4)
    report = model_report(model)
    experts = [module for module in report.modules if module.experts]
    starved = sum(module.starved for module in experts)
    assert 0 < starved < 16
    assert f"4 of the modules are matrices of 4 experts each; {starved} of 16 such matrices" in report.summary()
    assert "were starved" in caplog.text
    assert json.loads(json.dumps(report.to_dict()))["modules"][4]["experts"] == 4


def test_calibration_is_better_than_none(mixtral):
    """On the calibration tokens, in the mean squared error of the logits."""
    ids = tokens()
    expected = outputs(AutoModelForCausalLM.from_pretrained(mixtral), ids)
    errors = [
        (outputs(binarize(mixtral, method="arb-hrc", dataset=data, num_samples=4), ids) - expected).square().mean()
        for data in (tokens(), None)
    ]
    assert errors[0] < 0.8 * errors[1]


# Files


def test_a_checkpoint_that_holds_all_experts_in_one_tensor(mixtral, tmp_path):
    """Then the packed ones are stored so too, and the bits are the same."""
    float_model = tiny_moe("MixtralForCausalLM")
    target = tmp_path / "fused"
    target.mkdir()
    save_file(float_model.state_dict(), target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((mixtral / "config.json").read_text())
    choices = {"method": "arb-hrc", "dataset": tokens(), "num_samples": 4}
    fused, split = binarize(target, **choices), binarize(mixtral, **choices)
    ids = tokens(1, 8)
    assert torch.equal(outputs(fused, ids), outputs(split, ids))
    fused.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj_col_scale"].shape == (4, 2, 64)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(again, ids), outputs(split, ids))
    assert model_report(again).bits_per_weight == model_report(split).bits_per_weight


def test_inspect_counts_the_bytes_in_the_file(packed):
    report = model_report(AutoModelForCausalLM.from_pretrained(packed))
    inspection = inspect_model(packed)
    assert inspection.bits_per_weight == pytest.approx(report.bits_per_weight, rel=1e-12)
    assert [module.name for module in inspection.modules] == [module.name for module in report.modules]
    assert {m.name: m.stored_bytes for m in inspection.modules} == {m.name: m.stored_bytes for m in report.modules}
    assert inspection.kept == report.kept
    assert not any("experts" in name for name in inspection.float_tensors)
    shapes = {module.name: module.shape for module in inspection.modules}
    assert shapes[f"{LAYER.format(1)}.gate_up_proj"] == (4, 192, 64)


def test_packed_parameters_need_no_gradient_and_others_do(tmp_path):
    source = save_moe(tmp_path / "float", "GptOssForCausalLM")
    binarize(source).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    experts = model.get_submodule(LAYER.format(0))
    wanting = {name for name, parameter in experts.named_parameters() if parameter.requires_grad}
    assert wanting == {"gate_up_proj_bias", "down_proj_bias"}
    model(input_ids=tokens(1, 8)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert experts.down_proj_bias.grad.abs().max() > 0


@pytest.mark.parametrize("data", ["data-free", "calibrated"])
def test_device_map_auto(mixtral, data):
    """On the CPU: the sizes of the packed experts are known before there are any."""
    choices = {"dataset": tokens(), "num_samples": 4} if data == "calibrated" else {}
    config = ARBConfig(**{"block_size": 64, "method": "rtn", "dataset": None, **choices})
    model = AutoModelForCausalLM.from_pretrained(mixtral, quantization_config=config, device_map="auto")
    ids = tokens(1, 8)
    assert torch.equal(outputs(model, ids), outputs(binarize(mixtral, **choices), ids))
    quantizer, name = model.hf_quantizer, f"{LAYER.format(0)}.down_proj"
    quantizer.pre_quantized, config.dataset, quantizer.quantization_config.dataset = False, None, None
    size = quantizer.param_element_size(model, name, torch.empty(0))
    # 12 bytes of signs and two float16 scales for 96 columns
    assert size == (12 + 4) / 96


def test_generate_with_a_static_cache(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    ids = tokens(2, 6)
    dynamic = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(dynamic, model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static"))


def test_devices_and_offloading(packed, tmp_path):
    ids = tokens(1, 8)
    expected = outputs(AutoModelForCausalLM.from_pretrained(packed), ids)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(outputs(model, ids), expected)
    with pytest.raises(ValueError, match="is offloaded"):
        model.dequantize()
    low = {"dtype": torch.bfloat16, "offload_folder": tmp_path / "offload16"}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, **low)
    expected = outputs(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16), ids)
    assert torch.equal(outputs(model, ids), expected)


def test_dtype_and_backend(packed):
    ids = tokens(1, 8)
    expected = outputs(AutoModelForCausalLM.from_pretrained(packed), ids)
    low = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    assert low.get_parameter(f"{LAYER.format(0)}.down_proj").dtype == torch.uint8
    assert low.get_parameter(f"{LAYER.format(0)}.down_proj_row_scale").dtype == torch.float16
    torch.testing.assert_close(outputs(low, ids).float(), expected, rtol=0.1, atol=0.2)
    # the checkpoint has other names for the router, and for all of it where a class has no head
    assert low.get_parameter("model.layers.0.mlp.gate.weight").dtype == torch.bfloat16
    headless = AutoModel.from_pretrained(packed, dtype=torch.bfloat16)
    assert headless.get_parameter("embed_tokens.weight").dtype == torch.bfloat16
    assert torch.equal(outputs(headless, ids), outputs(low.model, ids))
    dense = AutoModelForCausalLM.from_pretrained(packed, quantization_config=ARBConfig(backend="dequantize"))
    assert dense.get_submodule(LAYER.format(0)).backend == "dequantize"
    torch.testing.assert_close(outputs(dense, ids), expected, rtol=1e-4, atol=1e-4)
