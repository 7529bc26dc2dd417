"""A tiny binarized Llama as it is saved, and what loading it refuses."""

from __future__ import annotations

import json

import pytest
from tiny_models import save_tiny, tokens
from transformers import LlamaForCausalLM

from optimum_arb import ARBConfig

LINEAR = "model.layers.1.mlp.up_proj"


def binarized_llama(folder):
    """A model binarized on tokens; its float form goes to a folder."""
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    return LlamaForCausalLM.from_pretrained(save_tiny(folder, "LlamaForCausalLM"), quantization_config=config)


def save_both(model, folder):
    """In one file, and in several."""
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    return folder


def weights(path):
    return sorted(path.glob("*.safetensors"))


def refusal(path, *patterns, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the patterns follow)
        LlamaForCausalLM.from_pretrained(path, **options)
    for pattern in patterns:
        assert error.match(pattern)


def quantization(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]
