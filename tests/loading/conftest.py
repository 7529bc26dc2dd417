"""A float Llama and its packed form."""

from __future__ import annotations

import pytest
from binarized_models import save_packed
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def packed(llama, tmp_path_factory):
    return save_packed(llama, tmp_path_factory.mktemp("packed"))
