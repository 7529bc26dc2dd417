"""Packed models for adapters."""

import pytest
from tiny_models import save_tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig


def save_packed(folder, family, config):
    save_tiny(folder / "float", family)
    AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config).save_pretrained(
        folder / "packed"
    )
    return folder / "packed"


@pytest.fixture(scope="session", params=["LlamaForCausalLM", "GPT2LMHeadModel"])
def packed_family(request, tmp_path_factory):
    """A packed model of linears, and one of GPT-2's transposed ones, with biases; both with a tokenizer."""
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    path = save_packed(tmp_path_factory.mktemp(request.param), request.param, config)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def packed_llama(tmp_path_factory):
    """One whose first linear is a float one."""
    config = ARBConfig(dataset=None, block_size=64, modules_to_not_convert=["layers.0.self_attn.q_proj"])
    return save_packed(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", config)


@pytest.fixture(scope="session")
def packed_whole(tmp_path_factory):
    """One without calibration, all of whose linears are packed."""
    folder = tmp_path_factory.mktemp("whole")
    return save_packed(folder, "LlamaForCausalLM", ARBConfig(dataset=None, block_size=64))
