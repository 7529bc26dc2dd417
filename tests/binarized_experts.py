"""Tiny mixtures of experts binarized by `from_pretrained`."""

from __future__ import annotations

from safetensors.torch import load_file, save_file
from tiny_models import tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig

LAYER = "model.layers.{}.mlp.experts"


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": None, "block_size": 64, "method": "rtn", **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def save_packed(source, path):
    """Saves it calibrated."""
    binarize(source, method="arb-hrc", dataset=tokens(), num_samples=4).save_pretrained(path)
    return path


def edit(source, target, change):
    """Copies a saved model with its tensors changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target
