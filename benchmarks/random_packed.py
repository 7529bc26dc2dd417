"""Llama-shaped models of random weights in bfloat16 and packed, as loading from disk leaves them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.conversion import Record
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton.timing import random_weight
from optimum_arb.quantizer import ARBHfQuantizer
from optimum_arb.report import model_report
from optimum_arb.version import __version__

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 2000,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def build(shape: str, planes: int | None, device: str, permuted: bool = False) -> LlamaForCausalLM:
    """A random model; made on the device, so that no second copy of it exists at any time.

    Args:
        shape: of `SHAPES`.
        planes: of its decoder linears, which are packed as `arb-hrc` packs them; None leaves the model in bfloat16.
        device: where.
        permuted: whether columns of packed weights are permuted.

    Returns:
        The model in evaluation mode; a packed one with the quantizer that saves it.
    """
    config = LlamaConfig(**{"vocab_size": 32000, "max_position_embeddings": 4096, **SHAPES[shape]})
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    packed: list[str] = []
    if planes is not None:
        choices = ARBConfig(method="arb-hrc", planes=planes, dataset=None)  # calibrated on nothing
        packed = [name for name, module in model.named_modules() if _is_packed(name, module)]
        for name in packed:
            plain = model.get_submodule(name)
            size = plain.in_features, plain.out_features
            form: dict[str, Any] = {"bias": False, "permuted": permuted, "device": "meta"}
            model.set_submodule(name, ARBLinear(*size, choices.layout, choices.block_size, **form))
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ARBLinear):
                _fill(module, permuted, device)
                continue
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # to_empty leaves its buffers unset
    if planes is not None:
        _make_savable(model, choices, packed)
        share_inputs(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    without_end(model)
    return model


def without_end(model: LlamaForCausalLM) -> None:
    """Lets `generate` go on to the length that it is told."""
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None


def _is_packed(name: str, module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear and name != "lm_head"


def _fill(layer: ARBLinear, permuted: bool, device: str) -> None:
    values = random_weight(layer.layout, layer.out_features, layer.in_features, layer.block_size, permuted, device)
    for name in ("weight", "row_scale", "col_scale", "permutation"):
        target, source = layer.packed_parameter(name), getattr(values, name)
        if target is not None:
            target.copy_(source * 0.05 if name == "row_scale" else source)  # so that activations stay finite


def _make_savable(model: LlamaForCausalLM, choices: ARBConfig, packed: list[str]) -> None:
    """Gives a packed model what `from_pretrained` would have left in it for `save_pretrained`."""
    quantizer = ARBHfQuantizer(choices, pre_quantized=True)
    quantizer.records = {name: Record(choices.method) for name in packed}
    quantization = quantizer.quantization_config
    quantization.optimum_arb_version = __version__
    quantization.modules_to_not_convert = ["lm_head"]
    owner: Any = model
    owner.hf_quantizer = quantizer
    owner.config.quantization_config = quantization
    quantization.bits_per_weight = model_report(model).bits_per_weight
