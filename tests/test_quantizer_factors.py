"""Models with products of two sign matrices through transformers: binarized, saved, loaded, changed, refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from svd_factors import install
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, ARBLinear, algorithms, model_report
from optimum_arb.export import export_gguf
from optimum_arb.inspection import inspect_model
from optimum_arb.nn import ARBFactorizedLinear


@pytest.fixture(autouse=True)
def fit(monkeypatch):
    install(monkeypatch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", tokenizer=True)


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": None, "method": "arb-dbf", "factor_bits": 1.5, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.fixture
def packed(llama, tmp_path):
    binarize(llama).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def change(path, **changed: torch.Tensor | None) -> None:
    """Replaces or removes tensors of layer 0's q_proj."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changed.items():
        key = f"model.layers.0.self_attn.q_proj.{name}"
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor.contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dataset", [None, "calibrated"])
def test_round_trip(llama, tmp_path, dataset):
    given = {"dataset": tokens(), "num_samples": 4} if dataset else {}
    model = binarize(llama, **given)
    layers = [module for module in model.modules() if isinstance(module, ARBLinear)]
    assert len(layers) == 14
    assert all(type(layer) is ARBFactorizedLinear for layer in layers)
    report = model_report(model)
    assert {module.layout for module in report.modules} == {"factors"}
    assert 1.3 < report.bits_per_weight <= 1.5
    assert all(module.bits_per_weight <= 1.5 for module in report.modules)
    ids = tokens(1, 8)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["method"], config["factor_bits"], config["format_version"]) == ("arb-dbf", 1.5, 2)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(outputs(again, ids), expected)
    assert again.model.layers[0].self_attn.q_proj.rank == layers[0].rank
    assert model_report(again).bits_per_weight == report.bits_per_weight
    assert again.model.layers[0].mlp.up_proj.first_product.shared_input is not None
    found = inspect_model(tmp_path)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert {module.layout for module in found.modules} == {"factors"}
    assert all("inner" not in name for name in found.float_tensors)
    copied = copy.deepcopy(again)
    assert torch.equal(outputs(copied, ids), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight_inner_row_scale.dtype == torch.float16
    assert float((outputs(half, ids).float() - expected).abs().max()) < 0.1 * float(expected.abs().max())
    plain = again.dequantize()
    assert torch.allclose(outputs(plain, ids), expected, rtol=1e-4, atol=1e-5)


def test_sharded(packed, llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))


def test_per_module(llama, tmp_path):
    """Planes and factors in one model, and ranks of one's own."""
    overrides = {
        "down_proj": {"method": "arb-hrc", "planes": 2, "block_size": 64},
        "v_proj": {"rank": 16},
        "o_proj": {"factor_bits": 0.9},
    }
    model = binarize(llama, overrides=overrides)
    block = model.model.layers[1]
    assert type(block.mlp.down_proj) is ARBLinear
    assert block.mlp.down_proj.layout.name == "planes-2-col"
    assert block.self_attn.v_proj.rank == 16
    assert block.self_attn.o_proj.bits_per_weight() <= 0.9
    assert block.self_attn.q_proj.bits_per_weight() > 1.3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))
    # the other way round: factors in a model of planes
    config = ARBConfig(
        dataset=None, act_order=True, planes=2, overrides={"up_proj": {"method": "arb-dbf", "factor_bits": 0.8}}
    )
    assert config.format_version == 2
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj) is ARBFactorizedLinear
    assert type(model.model.layers[0].mlp.gate_proj) is ARBLinear


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_where_one_plane_is_better(llama, tmp_path, monkeypatch, scale_bits):
    """It takes the place of the factors; that is told, loaded, and checked."""
    narrow = []

    def better(target, *_):
        narrow.append(target.shape)
        return target.shape[0] < 64  # k_proj and v_proj

    monkeypatch.setattr(algorithms, "rounding_is_better", better)
    model = binarize(llama, factor_bits=1.8, scale_bits=scale_bits)
    assert len(narrow) == 14
    assert type(model.model.layers[0].self_attn.k_proj) is ARBLinear
    assert type(model.model.layers[0].self_attn.q_proj) is ARBFactorizedLinear
    forms = {module.name: module.layout for module in model_report(model).modules}
    assert sorted(forms.values()) == ["factors"] * 10 + ["planes-1"] * 4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 8)
    assert torch.equal(outputs(again, ids), outputs(model, ids))
    assert {module.name: module.layout for module in inspect_model(tmp_path).modules} == forms
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids), outputs(model, ids))
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = tensors[key][:, :-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"k_proj.*layout planes-1, block_size=-1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_planes_alone_are_still_version_1(llama, tmp_path):
    binarize(llama, method="rtn", factor_bits=None).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["format_version"] == 1


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "OPTForCausalLM"])
def test_biases_and_transposed_weights(family, tmp_path):
    path = save_tiny(tmp_path / "float", family)
    model = binarize(path)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = tokens(1, 8)
    assert torch.equal(outputs(again, ids), outputs(model, ids))
    expected = outputs(again, ids)
    assert torch.allclose(outputs(again.dequantize(), ids), expected, rtol=1e-4, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"rank": 0, "factor_bits": None}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 2.5, "factor_bits": None}, "rank=2.5 must be a whole number"),
        ({"factor_bits": 0}, "factor_bits=0 must be a number of bits a weight"),
        ({"factor_bits": "1"}, "factor_bits='1' must be a number of bits"),
        ({"rank": 8}, "rank=8 and factor_bits=1.5 both decide the rank: give one"),
        ({"act_order": True}, "act_order=True does nothing with method='arb-dbf'"),
        ({"planes": 2}, "planes=2 needs method='arb-hrc'"),
        ({"method": "rtn"}, "factor_bits=1.5 needs method='arb-dbf': 'rtn' has no factors"),
        ({"overrides": {"q_proj": {"rank": -1}}}, "rank=-1 must be a whole number"),
    ],
)
def test_choices_that_do_not_go_together(choices, message):
    with pytest.raises(ValueError, match=message):
        ARBConfig(**{"method": "arb-dbf", "factor_bits": 1.5, **choices})


def test_no_layout():
    with pytest.raises(ValueError, match="products of two sign matrices, which have no layout"):
        _ = ARBConfig(method="arb-dbf").layout


def test_bits_by_default():
    config = ARBConfig(method="arb-dbf")
    shapes = config.stored_shapes(576, 576, permuted=False)
    stored = sum(n * k * (2 if name.endswith("scale") else 1) for name, (n, k) in shapes.items()) * 8
    assert 0.97 < stored / 576**2 <= 1.0
    assert config.resolved_rank(576, 576) == shapes["inner"][0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_inner": None}, r"'model.layers.0.self_attn.q_proj.weight_inner' is missing"),
        ({"weight_inner_row_scale": None}, "weight_inner_row_scale' is missing"),
        ({"weight_inner_col_scale": torch.ones(1, 95).half()}, r"weight_inner_col_scale' is F16 \[1, 95\]"),
        ({"weight_inner": torch.zeros(4, 12, dtype=torch.uint8)}, r"weight' is U8 .* but U8 \[96, 1\] follows"),
        ({"weight_inner": torch.zeros(0, 12, dtype=torch.uint8)}, "layout factors, rank=1"),
        ({"weight_inner": torch.zeros(12, dtype=torch.uint8)}, r"is U8 "),
        ({"weight_col_scale": torch.ones(1, 96).half()}, "weight_col_scale', which the layout factors"),
    ],
)
def test_changed_files(packed, changed, message):
    change(packed, **changed)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match=message):
        inspect_model(packed)


def test_a_rank_that_the_configuration_names_is_checked(llama, tmp_path):
    binarize(llama, rank=16, factor_bits=None).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["rank"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rank=24"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts(tmp_path):
    path = save_tiny(tmp_path / "float", "MixtralForCausalLM")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: method='arb-dbf' does not binarize experts yet"):
        binarize(path)
    model = binarize(path, overrides={"experts": {"method": "arb-hrc"}})
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))


def test_gguf(packed, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"product of two sign matrices .* no type of llama.cpp holds"):
        export_gguf(AutoModelForCausalLM.from_pretrained(packed), None, tmp_path / "model.gguf", allow_lossy=True)
    assert not (tmp_path / "model.gguf").exists()


def test_lora(packed):
    """Adapters train on top, merge into a float model, and into a new fit."""
    peft = pytest.importorskip("peft")
    from optimum_arb.integrations.peft import merge_dequantized, merge_rebinarized, prepare_for_training

    ids = tokens(2, 8)
    models = []
    for _ in range(2):
        model = prepare_for_training(AutoModelForCausalLM.from_pretrained(packed))
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        models.append(adapted)
    adapted = models[0]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_A" in n)
    expected = outputs(adapted, ids)
    merged = merge_dequantized(adapted)
    assert torch.allclose(outputs(merged, ids), expected, rtol=1e-3, atol=1e-3)
    binarized, report = merge_rebinarized(models[1])
    assert len(report.modules) == 4
    assert type(binarized.model.layers[0].self_attn.q_proj) is ARBFactorizedLinear
    assert all(module.error <= module.error_without_adapter for module in report.modules)
