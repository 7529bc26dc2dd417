"""What llama.cpp wants to know of a model: its name for the architecture, its hyperparameters, its names of tensors.

Llama and Mistral, Qwen2 and Qwen3. The hyperparameters are those that llama.cpp's own converter writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

# transformers' class -> (llama.cpp's architecture, whether it rotates neighbouring pairs of a head)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}


@dataclass
class Architecture:
    """How a model is described to llama.cpp.

    Attributes:
        name: llama.cpp's name.
        config: transformers' configuration of the model.
        pairs: whether rows of q and k are stored in the order of rotated pairs (`rotary_order`).
        notes: what differs from transformers and when.
    """

    name: str
    config: Any
    pairs: bool
    notes: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        head_dim = getattr(self.config, "head_dim", None)
        return head_dim or self.config.hidden_size // self.config.num_attention_heads

    @property
    def rope(self) -> dict[str, Any]:
        return dict(self.config.rope_parameters or {})


def describe_architecture(class_name: str, config: PreTrainedConfig) -> Architecture:
    """The architecture of a model.

    Args:
        class_name: the model's class.
        config: its configuration.

    Raises:
        ValueError: llama.cpp, or this export, has no such model; the message says what of it.
    """
    if class_name not in ARCHITECTURES:
        raise ValueError(f"{class_name} cannot be exported to GGUF: the export knows {', '.join(ARCHITECTURES)}.")
    name, pairs = ARCHITECTURES[class_name]
    found = Architecture(name, config, pairs)
    if found.config.hidden_act != "silu":
        raise ValueError(f"hidden_act={found.config.hidden_act!r} cannot be exported: llama.cpp's {name} has silu.")
    kind = found.rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type={kind!r} cannot be exported: the export knows default, linear and llama3.")
    if found.rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor cannot be exported: llama.cpp rotates whole heads.")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", window is not None) and window is not None:
        found.notes.append(
            f"llama.cpp has no sliding window for this architecture: the context is written as {window} tokens, up to "
            "which the two agree"
        )
    return found


def rotary_order(rows: int, heads: int) -> torch.Tensor:
    """The order in which llama.cpp's llama wants the rows of q and k: it rotates rows (2i, 2i+1) of a head, where
    transformers rotates (i, i + head_dim / 2). int64 `[rows]`, the old index of each new row."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def row_order(architecture: Architecture, name: str, rows: int) -> torch.Tensor | None:
    """`rotary_order` for the linears that need it, by their name in transformers; else None."""
    heads = {
        "q_proj": architecture.config.num_attention_heads,
        "k_proj": getattr(architecture.config, "num_key_value_heads", None) or architecture.config.num_attention_heads,
    }.get(name.rpartition(".")[2])
    return rotary_order(rows, heads) if architecture.pairs and heads else None


def write_hyperparameters(writer: GGUFWriter, architecture: Architecture) -> None:
    """Everything of `<architecture>.*`."""
    config = architecture.config
    writer.add_block_count(config.num_hidden_layers)
    context = config.max_position_embeddings
    if architecture.notes:
        context = min(context, config.sliding_window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(architecture.head_dim)
    rope = architecture.rope
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(architecture: Architecture) -> torch.Tensor | None:
    """Llama 3's divisors of the rotation frequencies, float32 `[head_dim / 2]`, the tensor `rope_freqs.weight`; None
    for models without."""
    rope = architecture.rope
    if rope.get("rope_type") != "llama3":
        return None
    base, size = float(rope["rope_theta"]), architecture.head_dim
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (old / wavelength - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelength > old / low, torch.full_like(middle, factor), middle)
    return torch.where(wavelength < old / high, torch.ones_like(middle), factors)


def tensor_names(architecture: Architecture, names: list[str]) -> dict[str, str]:
    """transformers' names of tensors -> llama.cpp's.

    Raises:
        ValueError: a tensor that llama.cpp's architecture does not have.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = get_tensor_name_map(arch, architecture.config.num_hidden_layers)
    result = {}
    for name in names:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"The tensor {name!r} cannot be exported: llama.cpp's {architecture.name} has none such.")
        result[name] = found
    return result
