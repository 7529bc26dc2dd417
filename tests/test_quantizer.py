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
from safetensors.torch import load_file, save_file
from tiny_models import outputs, save_tiny, text, tiny_tokenizer, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    pipeline,
)
from transformers.quantizers import auto

import optimum_arb
from optimum_arb import ARBConfig, ARBHfQuantizer, ARBLinear, model_report


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": None, "block_size": 64, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def packed(llama, tmp_path_factory):
    """A calibrated, saved model, with its tokenizer."""
    path = tmp_path_factory.mktemp("packed")
    binarize(llama, dataset=tokens(), num_samples=4).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


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


def test_saved_config_is_complete(packed):
    saved = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "arb"
    assert saved["format_version"] == 1
    assert saved["optimum_arb_version"] == optimum_arb.__version__
    assert saved["dataset"] == "custom"
    assert saved["calibration"]["samples"] == 4
    assert saved["calibration"]["sequence_length"] == 24
    assert len(saved["calibration"]["fingerprint"]) == 64
    assert saved["modules_to_not_convert"] == ["lm_head"]
    assert AutoConfig.from_pretrained(packed).quantization_config["bits_per_weight"] == saved["bits_per_weight"]


def test_bits_are_the_bytes_in_the_file(packed):
    tensors = load_file(packed / "model.safetensors")
    report = model_report(LlamaForCausalLM.from_pretrained(packed))
    linears = {module.name for module in report.modules}
    stored = sum(
        t.numel() * t.element_size()
        for name, t in tensors.items()
        if name.rpartition(".")[0] in linears and not name.endswith(".bias")
    )
    weights = sum(module.weights for module in report.modules)
    assert report.packed_bytes == stored
    assert report.bits_per_weight == stored * 8 / weights
    assert report.model_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    saved = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert saved["bits_per_weight"] == report.bits_per_weight


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_loading_leaves_the_packed_tensors_alone(packed, dtype):
    reference = dict(LlamaForCausalLM.from_pretrained(packed).named_parameters())
    model = LlamaForCausalLM.from_pretrained(packed, dtype=dtype)
    for name, parameter in model.named_parameters():
        packed_tensor = isinstance(model.get_submodule(name.rpartition(".")[0]), ARBLinear)
        assert parameter.dtype == (reference[name].dtype if packed_tensor else dtype)
        if packed_tensor:
            assert torch.equal(parameter, reference[name])
            assert not parameter.requires_grad
    assert torch.isfinite(outputs(model, tokens(1, 8))).all()


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


def test_without_the_head(packed):
    whole = LlamaForCausalLM.from_pretrained(packed)
    base = AutoModel.from_pretrained(packed)
    ids = tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    assert len(model_report(base).modules) == 14


def test_a_new_head_on_a_binarized_body(packed):
    model = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert "score" in model_report(model).kept
    assert outputs(model, tokens(1, 8)).shape == (1, 3)


def test_an_encoder_saved_without_its_pooler(tmp_path):
    source = save_tiny(tmp_path / "float", "BertForMaskedLM")
    config = ARBConfig(dataset=None, block_size=64)
    masked = AutoModelForMaskedLM.from_pretrained(source, quantization_config=config)
    masked.save_pretrained(tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert model_report(base).kept["pooler.dense"] == "not in the checkpoint"
    ids = tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, masked.bert(ids).last_hidden_state)


def test_full_names_in_patterns_do_not_bind_the_saved_model_to_its_class(llama, tmp_path):
    choices = {
        "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", r"re:model\.layers\.1\.mlp\..*"],
        "overrides": {r"re:model\.layers\.0\.mlp\..*": {"planes": 2}, "o_proj": {"skip": True}},
    }
    model = binarize(llama, dataset=tokens(), num_samples=4, **choices)
    report = {module.name: module for module in model_report(model).modules}
    assert report.keys() == {
        *(f"model.layers.0.self_attn.{x}_proj" for x in "kv"),
        *(f"model.layers.1.self_attn.{x}_proj" for x in "qkv"),
        *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert report["model.layers.0.mlp.up_proj"].layout == "planes-2-col"
    assert report["model.layers.0.self_attn.k_proj"].layout == "planes-1-col"
    assert model_report(model).kept["model.layers.0.self_attn.o_proj"] == "overrides: skip"
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert {f"model.{module.name}" for module in model_report(base).modules} == report.keys()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 8)
    assert torch.equal(outputs(model, ids), outputs(again, ids))
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, again.model(ids).last_hidden_state)


def test_an_override_may_change_the_method(llama, tmp_path):
    model = binarize(llama, method="arb-rc", overrides={"down_proj": {"method": "rtn"}, "v_proj": {"block_size": -1}})
    methods = {module.name.rpartition(".")[2]: module.method for module in model_report(model).modules}
    assert methods["down_proj"] == "rtn"
    assert methods["up_proj"] == "arb-rc"
    assert model.model.layers[0].self_attn.v_proj.block_size == -1
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(again, tokens(1, 8)))


def test_backend_is_chosen_at_load(packed):
    config = ARBConfig(backend="reference")
    with pytest.warns(UserWarning, match="backend"):
        model = LlamaForCausalLM.from_pretrained(packed, quantization_config=config)
    assert {m.backend for m in model.modules() if isinstance(m, ARBLinear)} == {"reference"}
    ids = tokens(1, 8)
    torch.testing.assert_close(
        outputs(model, ids), outputs(LlamaForCausalLM.from_pretrained(packed), ids), rtol=1e-4, atol=1e-4
    )


def test_the_same_config_again_is_no_second_binarization(packed):
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = LlamaForCausalLM.from_pretrained(packed, quantization_config=config)
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(LlamaForCausalLM.from_pretrained(packed), tokens(1, 8)))


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


def test_calibration_text_is_tokenized_with_the_models_tokenizer(llama):
    given = tokens(4, 16, seed=3)
    words = " ".join(f"w{index}" for index in given.flatten().tolist())
    from_text = binarize(llama, dataset=[words], num_samples=4, sequence_length=16)
    from_tokens = binarize(llama, dataset=given, num_samples=4)
    ids = tokens(1, 8)
    assert torch.equal(outputs(from_text, ids), outputs(from_tokens, ids))
    records = [model.config.quantization_config.calibration for model in (from_text, from_tokens)]
    assert records[0] == records[1]


def test_sequences_longer_than_the_model_are_cut(llama, caplog):
    with caplog.at_level("WARNING", logger="optimum_arb"):
        model = binarize(llama, dataset=[text(200)], num_samples=3, sequence_length=100)
    assert model.config.quantization_config.calibration["sequence_length"] == 64
    assert "64" in caplog.text


def test_calibration_lowers_the_output_error(llama):
    ids = tokens(8, 32, seed=5)
    expected = outputs(LlamaForCausalLM.from_pretrained(llama), ids)
    errors = [
        (outputs(binarize(llama, **choices), ids) - expected).square().mean().item()
        for choices in ({}, {"dataset": tokens(16, 32), "num_samples": 16})
    ]
    assert errors[1] < errors[0]


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
