"""A Llama of random weights, for what needs a model and none that says anything."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """As transformers initializes it, in float32; `changes` of `SHAPE`, whose 330,000 weights are few."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))
