"""What a saved configuration records of the run."""

from __future__ import annotations

import json

from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoConfig, LlamaForCausalLM

import optimum_arb
from optimum_arb import ARBConfig, model_report
from optimum_arb.reproduce import model_fingerprint


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


def test_the_fingerprint_of_a_subfolder_is_of_its_files(tmp_path):
    source = save_tiny(tmp_path / "models" / "llama", "LlamaForCausalLM")
    config = ARBConfig(dataset=None, block_size=64)
    (tmp_path / "models" / "config.json").write_text("{}")
    found = [
        LlamaForCausalLM.from_pretrained(path, quantization_config=config, **options).hf_quantizer.reproduce
        for path, options in ((source, {}), (tmp_path / "models", {"subfolder": "llama"}))
    ]
    prints = [block["models"]["base"]["fingerprint"] for block in found]
    assert prints == [model_fingerprint(source)] * 2
