"""The checks that transformers' own suite (its tests/quantization) makes of every quantizer, made of this one."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import tempfile
import weakref

import pytest
import torch
from tiny_models import outputs, save_tiny, tiny_tokenizer, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

from optimum_arb import ARBConfig, ARBHfQuantizer, ARBLinear, model_report

IDS = tokens(2, 8, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float model with biases and tied embeddings."""
    return save_tiny(tmp_path_factory.mktemp("opt"), "OPTForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    )
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model(packed):
    return AutoModelForCausalLM.from_pretrained(packed)


def packed_layers(model) -> dict[str, ARBLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ARBLinear)}


# The configuration


def test_config_to_dict():
    config = ARBConfig(planes=2, overrides={"down_proj": {"planes": 3}}, modules_to_not_convert=["q_proj"])
    written = config.to_dict()
    assert written.pop("requires") == config.requirement
    for key, value in written.items():
        assert getattr(config, "requirement" if key == "requires" else key) == value
    assert written["quant_method"] == "arb"


def test_config_from_dict_and_back():
    config = ARBConfig(method="arb-rc", salient_columns=8, dataset=None, damp_percent=0.05, other_modalities=True)
    again = ARBConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert vars(again) == vars(config)
    with_rest, unused = ARBConfig.from_dict({"planes": 2}, return_unused_kwargs=True, planes=3, nonsense=1)
    assert with_rest.planes == 3
    assert unused == {"nonsense": 1}


def test_config_json(tmp_path):
    config = ARBConfig(overrides={"down_proj": {"planes": 2}}, dataset=["some text"])
    text = config.to_json_string(use_diff=False)
    assert ARBConfig.from_dict({**json.loads(text), "dataset": None}).overrides == config.overrides
    assert json.loads(config.to_json_string()).items() <= json.loads(text).items()
    config.to_json_file(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(text)
    assert "some text" not in text
    assert "down_proj" in repr(config)


def test_config_update():
    config = ARBConfig()
    assert config.update(planes=2, other=3) == {"other": 3}
    assert config.planes == 2


def test_config_of_the_saved_model(model, packed):
    saved = AutoConfig.from_pretrained(packed)
    assert ARBConfig.from_dict(saved.quantization_config).to_dict() == model.config.quantization_config.to_dict()
    assert isinstance(model.config.quantization_config, ARBConfig)
    assert model.config.to_dict()["quantization_config"]["quant_method"] == "arb"
    assert "arb" in model.config.to_json_string()


# The model and its quantizer


def test_flags(model, source):
    assert model.is_quantized
    assert model.quantization_method == "arb"
    assert isinstance(model.hf_quantizer, ARBHfQuantizer)
    quantizer = model.hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert not quantizer.is_qat_trainable
    assert quantizer.is_compileable
    assert not quantizer.requires_calibration
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert not getattr(plain, "is_quantized", False)


def test_number_of_replaced_modules(model, source):
    plain = AutoModelForCausalLM.from_pretrained(source)
    linears = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    assert packed_layers(model).keys() == linears - {"lm_head"}
    assert type(model.lm_head) is nn.Linear


def test_number_of_parameters(model, source):
    plain = AutoModelForCausalLM.from_pretrained(source)
    layers = packed_layers(model)
    replaced = sum(plain.get_parameter(f"{name}.weight").numel() for name in layers)
    stored = sum(tensor.numel() for layer in layers.values() for tensor in layer.packed().values())
    assert model.num_parameters() == plain.num_parameters() - replaced + stored
    # nothing that was not binarized has gone, and nothing packed can be trained
    assert model.num_parameters(only_trainable=True) == plain.num_parameters() - replaced
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embeddings
    assert sum(module.weights for module in model_report(model).modules) == replaced


def test_memory_footprint(model, source):
    plain = AutoModelForCausalLM.from_pretrained(source)
    layers = packed_layers(model)
    before = sum(plain.get_parameter(f"{name}.weight").nbytes for name in layers)
    after = sum(tensor.nbytes for layer in layers.values() for tensor in layer.packed().values())
    assert model.get_memory_footprint() == plain.get_memory_footprint() - before + after
    assert after == model_report(model).packed_bytes
    assert after < before / 10


def test_modules_not_to_convert(source):
    config = ARBConfig(dataset=None, block_size=64, modules_to_not_convert=["fc1", "layers.0.self_attn.q_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    names = packed_layers(model).keys()
    assert not any(name.endswith("fc1") for name in names)
    assert "model.decoder.layers.0.self_attn.q_proj" not in names
    assert "model.decoder.layers.1.self_attn.q_proj" in names


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


# Saving


@pytest.mark.parametrize("how", ["plain", "shards", "state_dict"])
def test_save_and_load(model, tmp_path, how):
    kwargs = {"plain": {}, "shards": {"max_shard_size": "20KB"}, "state_dict": {"state_dict": model.state_dict()}}[how]
    model.save_pretrained(tmp_path, **kwargs)
    assert not list(tmp_path.glob("*.bin"))
    again, info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert torch.equal(outputs(model, IDS), outputs(again, IDS))


def test_save_twice(packed, tmp_path):
    """A model that was loaded binarized is saved and loaded again without loss."""
    first = AutoModelForCausalLM.from_pretrained(packed)
    first.save_pretrained(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(first, IDS), outputs(second, IDS))
    assert first.config.quantization_config.to_dict() == second.config.quantization_config.to_dict()


def test_load_state_dict(model, packed):
    other = AutoModelForCausalLM.from_pretrained(packed)
    for layer in packed_layers(other).values():
        layer.weight.data.bitwise_not_()
    assert not torch.equal(outputs(other, IDS), outputs(model, IDS))
    assert not any(other.load_state_dict(model.state_dict()))
    assert torch.equal(outputs(other, IDS), outputs(model, IDS))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, how):
    copied = how(model)
    assert torch.equal(outputs(copied, IDS), outputs(model, IDS))
    layer = packed_layers(copied)["model.decoder.layers.0.fc1"]
    layer.weight.data.bitwise_not_()
    assert not torch.equal(outputs(copied, IDS), outputs(model, IDS))
    with tempfile.TemporaryDirectory() as path:
        copied.save_pretrained(path)
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(path), IDS), outputs(copied, IDS))


def test_dequantize(model):
    expected = outputs(model, IDS)
    model.dequantize()
    assert not packed_layers(model)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    torch.testing.assert_close(outputs(model, IDS), expected, rtol=1e-4, atol=1e-4)
    model.half()  # allowed again


# Running and training


def test_pipeline(packed):
    generator = pipeline("text-generation", model=str(packed), max_new_tokens=4, do_sample=False)
    assert generator("w5 w6")[0]["generated_text"].startswith("w5 w6")
    loaded = pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(packed),
        tokenizer=tiny_tokenizer(),
        max_new_tokens=4,
        do_sample=False,
    )
    assert loaded("w5 w6") == generator("w5 w6")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_generation_in_every_grad_mode(model, mode):
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with mode():
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, num_beams=2)[:, :8], IDS)


def test_loading_in_inference_mode(packed, source):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(packed)
        assert torch.equal(outputs(model, IDS), outputs(AutoModelForCausalLM.from_pretrained(packed), IDS))
        fresh = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
        )
        assert torch.equal(outputs(fresh, IDS), outputs(model, IDS))


def test_gradients(model):
    """As transformers trains adapters on every quantizer: the base is frozen, small layers beside it learn."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    class Adapter(nn.Module):
        def __init__(self, layer: ARBLinear):
            super().__init__()
            self.layer = layer
            self.down = nn.Linear(layer.in_features, 4, bias=False)
            self.up = nn.Linear(4, layer.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.layer(x) + self.up(self.down(x))

    expected = outputs(model, IDS)
    for name, layer in packed_layers(model).items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            model.set_submodule(name, Adapter(layer))
    assert torch.equal(outputs(model, IDS), expected)
    model(IDS, labels=IDS).loss.backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert len(adapters) == 6
    for adapter in adapters:
        assert adapter.up.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in adapter.layer.parameters())


def test_training_without_adapters_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


def test_losing_the_model_frees_it(packed):
    """Neither hooks nor caches of this package keep a model alive."""
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=ARBConfig(backend="dequantize"))
    outputs(model, IDS)
    gone = weakref.ref(packed_layers(model)["model.decoder.layers.0.fc1"])
    del model
    gc.collect()
    assert gone() is None
