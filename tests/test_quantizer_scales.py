"""Models whose scales are stored in 8 bits, through transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from svd_factors import install
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, model_report
from optimum_arb.checkpoint.estimate import estimate
from optimum_arb.inspection import inspect_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": None, "block_size": 64, "scale_bits": 8, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize(
    "choices",
    [
        {"planes": 2},
        {"method": "rtn"},
        {"method": "arb-dbf", "factor_bits": 1.5},
        {"planes": 1, "dataset": tokens(), "num_samples": 4},
    ],
    ids=["planes", "rtn", "factors", "calibrated"],
)
def test_round_trip(llama, tmp_path, monkeypatch, choices):
    install(monkeypatch)
    model = binarize(llama, **choices)
    wide = model_report(binarize(llama, **{**choices, "scale_bits": 16})).bits_per_weight
    report = model_report(model)
    assert report.bits_per_weight < wide if "factor_bits" not in choices else 1.4 < report.bits_per_weight <= 1.5
    ids = tokens(1, 8)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["scale_bits"], saved["format_version"]) == (8, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("decoded" in name for name in tensors)
    assert all(t.dtype == torch.uint8 for name, t in tensors.items() if "_scale" in name and "grid" not in name)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # the first call may be compiled, which cannot look whether the codes were decoded
    torch.compiler.reset()  # other tests may have compiled it for many layers
    compiled = torch.compile(again.model.layers[0].mlp.up_proj, fullgraph=True, backend="eager")
    x = torch.randn(2, 96)
    assert torch.equal(compiled(x), model.model.layers[0].mlp.up_proj(x))
    assert torch.equal(outputs(again, ids), expected)
    found = inspect_model(tmp_path)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert sum(module.stored_bytes for module in found.modules) == report.packed_bytes
    given = {**choices, "dataset": None}
    if "dataset" not in choices:
        guess = estimate(str(llama), ARBConfig(**{"block_size": 64, "scale_bits": 8, **given}), budget=None)
        assert guess.packed_bytes == report.packed_bytes


def test_offloaded_to_disk(llama, tmp_path):
    model = binarize(llama, planes=2)
    model.save_pretrained(tmp_path / "packed")
    ids = tokens(1, 8)
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert again.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(outputs(again, ids), outputs(model, ids))


def test_experts_keep_16_bits(tmp_path):
    path = save_tiny(tmp_path / "float", "MixtralForCausalLM")
    model = binarize(path)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))
    block = again.model.layers[0]
    assert block.self_attn.q_proj.weight_row_scale.dtype == torch.uint8
    assert block.mlp.experts.down_proj_row_scale.dtype == torch.float16
    guess = estimate(str(path), ARBConfig(dataset=None, block_size=64, scale_bits=8), budget=None)
    assert guess.packed_bytes == model_report(model).packed_bytes


def test_half_precision(llama, tmp_path):
    binarize(llama, planes=2).save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = half.model.layers[0].mlp.up_proj
    assert layer.decoded_row_scale.dtype == torch.float16
    assert layer.weight_scale_grid.dtype == torch.float32
    full = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(layer.dequantize(), full.model.layers[0].mlp.up_proj.dequantize())


@pytest.mark.parametrize("method", ["arb", "arb-rc", "billm", "arb-x"])
def test_other_methods_are_refused(method):
    with pytest.raises(ValueError, match=f"scale_bits=8 needs method .* the scales of '{method}' may be negative"):
        ARBConfig(method=method, scale_bits=8)
    assert ARBConfig(scale_bits=8, overrides={"q_proj": {"method": method}}).format_version == 2


def test_choices():
    for value in (4, "8", True, 8.5):
        with pytest.raises(ValueError, match="must be 16 or 8"):
            ARBConfig(scale_bits=value)
    assert ARBConfig(scale_bits=16).format_version == 1
    assert ARBConfig(overrides={"q_proj": {"scale_bits": 8}}).format_version == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_scale_grid": None}, r"weight_row_scale' is U8 .*, but F16 or F32"),
        ({"weight_scale_grid": torch.zeros(3, 2)}, r"weight_scale_grid' is F32 \[3, 2\] .* F32 \[4, 2\] follows"),
        ({"weight_scale_grid": torch.zeros(4, 2).half()}, r"weight_scale_grid' is F16"),
        ({"weight_row_scale": torch.zeros(96, 4, dtype=torch.int8)}, r"weight_row_scale' is I8"),
    ],
)
def test_changed_files(llama, tmp_path, changed, message):
    binarize(llama, planes=2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in changed.items():
        key = f"model.layers.0.self_attn.q_proj.{name}"
        del tensors[key]
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
