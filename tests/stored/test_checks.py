"""What is refused of a binarized checkpoint whatever its checksums say."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
from saved_llama import LINEAR, quantization, refusal, weights
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_arb.stored.checksums import seal
from optimum_arb.stored.header import read_header


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["row_scale", "col_scale"])
def test_scales_that_are_no_numbers(one, value, name):
    file = one / "model.safetensors"
    key = f"{LINEAR}.weight_{name}"
    tensor = read_header(file)[0][key]
    content = bytearray(file.read_bytes())
    kind = {"F16": "<e", "F32": "<f"}[tensor.dtype]
    content[tensor.start : tensor.start + struct.calcsize(kind)] = struct.pack(kind, value)
    file.write_bytes(content)
    seal([file], quantization(one))
    refusal(one, rf"^{LINEAR}: the tensor '{key}' holds NaN or Inf")


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_leads_out_of_the_directory(shards, saved, absolute):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    outside = shutil.copytree(saved / "shards", shards.parent / "outside")
    prefix = f"{outside}/" if absolute else "../outside/"
    content["weight_map"] = {key: prefix + name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    refusal(shards, "out of the model's directory")


def test_a_directory_that_is_named_from_elsewhere(shards, monkeypatch):
    (shards / "below").mkdir()
    monkeypatch.chdir(shards / "below")
    LlamaForCausalLM.from_pretrained("..")


def test_more_layers_than_any_model_has(one):
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    refusal(one, "num_hidden_layers=1000000000 in the model's config.json")


def test_another_kind_of_model(one):
    """Of which the checkpoint holds the head at most."""
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ValueError, match="is a checkpoint of another kind of model"):
        AutoModelForCausalLM.from_pretrained(one)


def test_architectures_that_are_no_names(one):
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "architectures": 7}))
    # transformers 5.16 checks the field itself
    with pytest.raises(Exception, match=r"architectures=7 in the model's config\.json is no list|'architectures'"):
        LlamaForCausalLM.from_pretrained(one)


def test_a_pipe_is_not_waited_for(shards):
    file = weights(shards)[1]
    file.unlink()
    os.mkfifo(file)
    refusal(shards, rf".*{file.name} is no file")
