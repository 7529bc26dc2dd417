"""Tiny models binarized by `from_pretrained`."""

from __future__ import annotations

from tiny_models import tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": None, "block_size": 64, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def save_packed(source, path):
    """Saves it calibrated, with its tokenizer."""
    binarize(source, dataset=tokens(), num_samples=4).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
