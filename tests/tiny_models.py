"""Tiny random models of each family, and a tokenizer for them, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 96
_LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA = {**_LLAMA, "head_dim": 24, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

# class of the model -> (class of its configuration, its arguments, linears that are binarized)
CAUSAL = {
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA, 14),
    "OPTForCausalLM": (
        "OPTConfig",
        {**_BERT, "ffn_dim": 160, "word_embed_proj_dim": 64, "dropout": 0.0},
        14,
    ),
    "Qwen2ForCausalLM": ("Qwen2Config", _LLAMA, 14),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_LLAMA, "head_dim": 24}, 14),
    "MistralForCausalLM": ("MistralConfig", {**_LLAMA, "sliding_window": 8}, 14),
    "Gemma2ForCausalLM": ("Gemma2Config", _GEMMA, 14),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _GEMMA, 14),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 96, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 64}, 8),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _BERT, 8),
    "PhiForCausalLM": ("PhiConfig", _LLAMA, 12),
}
ENCODERS = {
    "BertModel": ("BertConfig", _BERT, 13),
    "BertForMaskedLM": ("BertConfig", _BERT, 12),
    "RobertaForSequenceClassification": ("RobertaConfig", _BERT, 12),
}
OTHERS = {
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
        28,
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}, 12),
}
FAMILIES = {**CAUSAL, **ENCODERS, **OTHERS}


def tiny_model(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of about 100k weights, in evaluation mode."""
    config_class, arguments, _ = FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
    if family != "T5ForConditionalGeneration":
        del special["decoder_start_token_id"]
    config = getattr(transformers, config_class)(**{"vocab_size": VOCABULARY, **special, **arguments, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, family)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # transformers' own initialization is so small that every logit is alike
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.6 / parameter.shape[1] ** 0.5, generator=generator)
    return model


def save_tiny(path: Path, family: str, tokenizer: bool = False, **changes) -> Path:
    """Saves a tiny model, and a tokenizer if asked; returns the directory."""
    tiny_model(family, **changes).save_pretrained(path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path


def tokens(samples: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 `[samples, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (samples, length), generator=generator)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w5 to w95."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text(words: int, seed: int = 0) -> str:
    """Random words of the tiny tokenizer."""
    return " ".join(f"w{index}" for index in tokens(1, words, seed)[0].tolist())


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    result = model(input_ids=ids, **kwargs)
    return result.logits if "logits" in result else result.last_hidden_state
