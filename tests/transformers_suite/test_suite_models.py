"""The configuration, the model and its quantizer, as transformers' own suite (its tests/quantization) checks them."""

from __future__ import annotations

import json

from packed_opt import packed_layers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_arb import ARBConfig, ARBHfQuantizer, model_report

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
