"""Tiny models whose dimensions 128 divides, and tokenizers of the kinds that llama.cpp has."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from optimum_arb import ARBConfig
from optimum_arb.data import bundled_text

VOCABULARY = 384
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def save_model(path: Path, family: str = "Llama", **changes) -> Path:
    """A random model in float32, with norms and biases that matter; returns its directory."""
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(path)
    return path


def binarize(path: Path, config: ARBConfig | None = None):
    """The binarized model of a directory, calibrated on a few random tokens."""
    if config is None:
        tokens = torch.randint(2, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
        config = ARBConfig.for_gguf(dataset=tokens)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32).eval()


def byte_level_tokenizer(pre_tokenizer, **model) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([bundled_text("wikitext-2")[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
