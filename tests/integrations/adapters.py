"""Packed models with LoRA adapters, for the tests of PEFT."""

from __future__ import annotations

import peft
import torch
from tiny_models import tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBLinear

IDS = tokens(2, 12, seed=1)


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def randomize(model, seed: int = 0, std: float = 0.1) -> None:
    """Adapters that change something: PEFT begins with those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std, generator=generator)


def packed_tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": parameter.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, ARBLinear)
        for key, parameter in module.named_parameters(recurse=False)
    }
