"""Devices and dtypes, as transformers' own suite (its tests/quantization) checks them."""

from __future__ import annotations

import pytest
import torch
from packed_opt import IDS, packed_layers
from tiny_models import outputs, save_tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from optimum_arb import ARBConfig

# Devices


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "sequential"])
def test_device_map(packed, device_map):
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert torch.isfinite(outputs(model, IDS)).all()


def test_device_map_over_two_places(packed, tmp_path):
    """Layers on the CPU beside layers on disk: hooks bring the packed tensors in."""
    device_map = {
        "model.decoder.embed_tokens": "cpu",
        "model.decoder.embed_positions": "cpu",
        "model.decoder.project_in": "cpu",
        "model.decoder.project_out": "cpu",
        "model.decoder.final_layer_norm": "cpu",
        "model.decoder.layers.0": "cpu",
        "model.decoder.layers.1": "disk",
        "lm_head": "cpu",
    }
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, offload_folder=tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(outputs(model, IDS), outputs(whole, IDS))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again, IDS), outputs(whole, IDS))


def test_moving_the_model(model):
    expected = outputs(model, IDS)
    assert torch.equal(outputs(model.to("cpu"), IDS), expected)
    assert torch.equal(outputs(model.cpu(), IDS), expected)
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert packed_layers(model)["model.decoder.layers.0.fc1"].weight.dtype == torch.uint8


# Dtypes


@pytest.mark.parametrize("cast", ["half", "float"])
def test_casts_that_transformers_refuses(model, cast):
    with pytest.raises(ValueError, match=f"`.{cast}\\(\\)` is not supported for quantized model"):
        getattr(model, cast)()


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: model.to(dtype=torch.bfloat16),
        lambda model: model.bfloat16(),
    ],
)
def test_casts_keep_the_packed_tensors(model, packed, tmp_path, cast):
    reference = AutoModelForCausalLM.from_pretrained(packed)
    result = cast(model)
    assert result is model
    assert model.dtype == torch.bfloat16
    for name, layer in packed_layers(model).items():
        for key, tensor in reference.get_submodule(name).packed().items():
            assert layer.packed()[key].dtype == tensor.dtype
            assert torch.equal(layer.packed()[key], tensor)
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    assert outputs(model, IDS).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, IDS), outputs(model, IDS))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", "bfloat16", None])
def test_dtype_of_loading(packed, key, dtype):
    model = AutoModelForCausalLM.from_pretrained(packed, **({} if dtype is None else {key: dtype}))
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16, None: torch.float32}.get(dtype, dtype)
    assert model.dtype == model.config.dtype == expected
    assert model.lm_head.weight.dtype == expected
    assert {layer.weight.dtype for layer in packed_layers(model).values()} == {torch.uint8}
    assert {layer.weight_row_scale.dtype for layer in packed_layers(model).values()} == {torch.float16}
    assert outputs(model, IDS).dtype == expected


@pytest.mark.parametrize("data", ["data-free", "calibrated", "saved"])
def test_modules_that_stay_in_float32(tmp_path, data):
    """T5's `wo`: float32 in a model of half precision, whatever the quantizer does."""
    source = save_tiny(tmp_path / "float", "T5ForConditionalGeneration")
    config = ARBConfig(dataset=None if data == "data-free" else tokens(), num_samples=4, block_size=64)
    model = T5ForConditionalGeneration.from_pretrained(source, quantization_config=config, dtype=torch.float16)
    if data == "saved":
        model.save_pretrained(tmp_path / "packed")
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    wo = model.decoder.block[0].layer[2].DenseReluDense.wo
    assert type(wo) is nn.Linear
    assert wo.weight.dtype == torch.float32
    assert model.shared.weight.dtype == torch.float16
    assert torch.isfinite(outputs(model, IDS)).all()
