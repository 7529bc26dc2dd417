"""`ARBHfQuantizer`: what a user sees of it through transformers."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from binarized_models import binarize, save_packed
from safetensors.torch import load_file, save_file
from tiny_models import outputs, save_tiny, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    pipeline,
)
from transformers.quantizers import auto

import optimum_arb
from optimum_arb import ARBConfig, ARBHfQuantizer, model_report


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def packed(llama, tmp_path_factory):
    return save_packed(llama, tmp_path_factory.mktemp("packed"))


def test_importing_again_does_not_register_twice():
    assert auto.AUTO_QUANTIZER_MAPPING["arb"] is ARBHfQuantizer
    importlib.reload(optimum_arb)
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(ARBConfig) == 1
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["arb"] is ARBConfig


def test_a_saved_model_loads_in_a_new_process(packed):
    ids = tokens(1, 8)
    expected = outputs(LlamaForCausalLM.from_pretrained(packed), ids)
    script = (
        "import sys, torch, optimum_arb\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(repr(model(torch.tensor(eval(sys.argv[2]))).logits.double().sum().item()))\n"
    )
    command = [sys.executable, "-c", script, str(packed), str(ids.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(expected.double().sum().item(), rel=1e-6)


def test_report_after_reload_and_its_text(llama, packed, tmp_path):
    fresh = model_report(binarize(llama, dataset=tokens(), num_samples=4))
    again = model_report(LlamaForCausalLM.from_pretrained(packed))
    assert fresh.kept == again.kept == {"lm_head": "output embedding"}
    assert fresh.mean_output_error is not None
    assert 0 < fresh.mean_output_error < 1
    assert again.mean_output_error == fresh.mean_output_error  # from arb_report.json
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(packed / file, bare)
    assert model_report(LlamaForCausalLM.from_pretrained(bare)).mean_output_error is None
    assert all(module.weight_error > 0 for module in fresh.modules)
    assert "lm_head: output embedding" in fresh.summary()
    assert f"{fresh.bits_per_weight:.3f} bits" in fresh.summary()
    assert json.loads(json.dumps(fresh.to_dict()))["packed_bytes"] == fresh.packed_bytes


def test_report_of_a_float_model(llama):
    with pytest.raises(ValueError, match="no binarized module"):
        model_report(LlamaForCausalLM.from_pretrained(llama))


def test_the_users_config_is_not_changed(llama):
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    before = copy.deepcopy(config.__dict__)
    first = LlamaForCausalLM.from_pretrained(llama, quantization_config=config)
    assert config.__dict__ == before
    second = LlamaForCausalLM.from_pretrained(llama, quantization_config=config)
    ids = tokens(1, 8)
    assert torch.equal(outputs(first, ids), outputs(second, ids))


@pytest.mark.parametrize("method", ["rtn", "billm", "arb", "arb-x", "arb-rc", "arb-hrc"])
@pytest.mark.parametrize("data", ["data-free", "calibrated"])
def test_every_method_survives_saving(llama, tmp_path, method, data):
    dataset = tokens() if data == "calibrated" else None
    model = binarize(llama, method=method, dataset=dataset, num_samples=4, block_size=128)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(model, ids), outputs(again, ids))
    assert {module.method for module in model_report(again).modules} == {method}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("data", ["data-free", "calibrated"])
def test_binarize_in_half_precision(llama, tmp_path, dtype, data):
    config = ARBConfig(dataset=tokens() if data == "calibrated" else None, num_samples=4, block_size=64)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(again, tokens(1, 8)))


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("data", ["data-free", "calibrated", "packed"])
def test_device_maps(llama, packed, device_map, data):
    ids = tokens(1, 8)
    if data == "packed":
        model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
        expected = AutoModelForCausalLM.from_pretrained(packed)
    else:
        choices = {"dataset": tokens() if data == "calibrated" else None, "num_samples": 4, "block_size": 64}
        config = ARBConfig(**choices)
        model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map=device_map)
        expected = binarize(llama, **choices)
    assert torch.equal(outputs(model, ids), outputs(expected, ids))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_pipeline(packed):
    generator = pipeline("text-generation", model=str(packed), max_new_tokens=5, do_sample=False)
    answer = generator("w5 w6 w7")[0]["generated_text"]
    assert answer.startswith("w5 w6 w7")
    assert len(answer.split()) > 3


def test_an_override_may_change_the_method(llama, tmp_path):
    model = binarize(llama, method="arb-rc", overrides={"down_proj": {"method": "rtn"}, "v_proj": {"block_size": -1}})
    methods = {module.name.rpartition(".")[2]: module.method for module in model_report(model).modules}
    assert methods["down_proj"] == "rtn"
    assert methods["up_proj"] == "arb-rc"
    assert model.model.layers[0].self_attn.v_proj.block_size == -1
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(again, tokens(1, 8)))


def test_tied_embeddings_stay_tied(tmp_path):
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM", tie_word_embeddings=True)
    model = binarize(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "packed")
    assert "lm_head.weight" not in load_file(tmp_path / "packed" / "model.safetensors")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(again, tokens(1, 8)))
    assert model_report(again).model_bytes == sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "packed" / "model.safetensors").values()
    )


@pytest.mark.parametrize("dataset", [None, tokens()], ids=["data-free", "calibrated"])
def test_a_bias_that_the_float_checkpoint_lacks_is_initialized(tmp_path, dataset):
    source = save_tiny(tmp_path, "OPTForCausalLM")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.bias"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = binarize(source, dataset=dataset, num_samples=4)
    assert torch.equal(model.model.decoder.layers[1].fc1.bias, torch.zeros(160))
    assert torch.isfinite(outputs(model, tokens(1, 8))).all()


@pytest.mark.parametrize("dataset", [None, tokens()], ids=["data-free", "calibrated"])
def test_a_module_that_the_float_checkpoint_lacks_stays_in_float(tmp_path, dataset, caplog):
    source = save_tiny(tmp_path, "BertForMaskedLM")
    config = ARBConfig(dataset=dataset, num_samples=4, block_size=64)
    with caplog.at_level("WARNING", logger="optimum_arb"):
        model = AutoModel.from_pretrained(source, quantization_config=config)
    assert type(model.pooler.dense) is torch.nn.Linear
    assert model_report(model).kept == {"pooler.dense": "not in the checkpoint"}
    assert "pooler.dense" in caplog.text
    model.save_pretrained(tmp_path / "packed")
    again = AutoModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(again.pooler.dense.weight, model.pooler.dense.weight)
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(again, tokens(1, 8)))


def renamed(source, target):
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors = {key.replace("model.", "trunk.", 1): tensor for key, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dataset", [None, tokens()], ids=["data-free", "calibrated"])
def test_key_mapping_of_a_float_checkpoint(llama, tmp_path, dataset):
    """It is saved under the model's own names, and loads without the mapping."""
    options = {"dataset": dataset, "num_samples": 4, "block_size": 64}
    source = renamed(llama, tmp_path / "renamed")
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=ARBConfig(**options), key_mapping={r"^trunk\.": "model."}
    )
    expected = binarize(llama, **options).state_dict()
    model.save_pretrained(tmp_path / "saved")
    for found in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert found.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())


def test_key_mapping_of_a_binarized_checkpoint(packed, tmp_path):
    path = renamed(packed, tmp_path / "renamed")
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is missing .* has 'trunk.* without key_mapping"):
        AutoModelForCausalLM.from_pretrained(path, key_mapping={r"^trunk\.": "model."})


def test_the_configuration_of_a_loaded_model_loads_it_again(packed):
    """transformers asks the quantization_config in it as it asks a dictionary."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    again = LlamaForCausalLM.from_pretrained(packed, config=model.config)
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(again, tokens(1, 8)))


def test_deepcopy_and_flags(packed):
    model = LlamaForCausalLM.from_pretrained(packed)
    ids = tokens(1, 8)
    assert torch.equal(outputs(copy.deepcopy(model), ids), outputs(model, ids))
    quantizer = model.hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_dequantize_in_another_dtype(packed):
    plain = LlamaForCausalLM.from_pretrained(packed).dequantize(torch.bfloat16)
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert not getattr(plain, "is_quantized", False)


def test_dequantized_model_is_saved_as_a_plain_one(packed, tmp_path):
    plain = LlamaForCausalLM.from_pretrained(packed).dequantize()
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(plain, tokens(1, 8)), outputs(again, tokens(1, 8)))
