"""The intact models."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

import optimum_arb
from optimum_arb import ARBConfig

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_models(folder: Path) -> None:
    """The intact models, each in a directory of its own."""
    ids = torch.randint(5, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    gpt2 = {"vocab_size": 96, "n_embd": 96, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 64}
    llama, mixtral = LlamaConfig(**_SMALL), MixtralConfig(**_SMALL, num_local_experts=4)
    made: tuple[tuple[str, Any, dict[str, Any], dict[str, Any]], ...] = (
        ("one-file", llama, {"dataset": ids, "num_samples": 4}, {}),
        ("shards", llama, {"dataset": ids, "num_samples": 4, "planes": 2, "seed": 1}, {"max_shard_size": "60KB"}),
        ("salient", llama, {"dataset": None, "method": "arb-rc", "num_iterations": 1}, {}),
        ("experts", mixtral, {"dataset": None}, {"max_shard_size": "200KB"}),
        # k_proj: one plane in the place of factors that are worse
        ("factors", llama, {"dataset": None, "method": "arb-dbf", "overrides": {"k_proj": {"factor_bits": 1.5}}}, {}),
        ("grids", llama, {"dataset": ids, "num_samples": 4, "hadamard": 64, "scale_bits": 8, "block_size": -1}, {}),
        ("transposed", GPT2Config(**gpt2), {"dataset": None, "method": "rtn"}, {}),
    )
    for name, config, choices, options in made:
        torch.manual_seed(0)
        source = folder.parent / "float"
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
        quantization = ARBConfig(**{"block_size": 64, **choices})
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization)
        model.save_pretrained(folder / name, **options)
        shutil.rmtree(source)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Name of each packed tensor of a loaded model -> its digest."""
    packed = (optimum_arb.ARBLinear, optimum_arb.ARBExperts)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, packed):
            for key, tensor in module.named_parameters(recurse=False):
                if "bias" not in key:
                    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + content)
                    found[f"{name}.{key}"] = digest.hexdigest()
    return found
