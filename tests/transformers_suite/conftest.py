"""A float OPT and its packed form, for the checks that transformers' own suite makes of every quantizer."""

from __future__ import annotations

import pytest
from tiny_models import save_tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig


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
