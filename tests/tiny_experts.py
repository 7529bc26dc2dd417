"""Tiny random models with experts, and single modules of experts."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tiny_models import VOCABULARY
from torch import nn
from transformers import PreTrainedModel

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
_QWEN = {**_LLAMA, "num_experts": 4, "moe_intermediate_size": 48}
_DEEPSEEK = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GPT_OSS = {
    **_LLAMA,
    "head_dim": 16,
    "num_local_experts": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

# class of the model -> (class of its configuration, its arguments, experts of a layer, keys on disk of expert 1's
# down_proj in the last layer, or of all experts' where the checkpoint holds them in one tensor)
MOE = {
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4},
        4,
        "model.layers.1.block_sparse_moe.experts.1.w2.weight",
    ),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**_QWEN, "head_dim": 16},
        4,
        "model.layers.1.mlp.experts.1.down_proj.weight",
    ),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", _DEEPSEEK, 8, "model.layers.1.mlp.experts.1.down_proj.weight"),
    "OlmoeForCausalLM": (
        "OlmoeConfig",
        {**_LLAMA, "num_experts": 4},
        4,
        "model.layers.1.mlp.experts.1.down_proj.weight",
    ),
    "GptOssForCausalLM": ("GptOssConfig", _GPT_OSS, 4, "model.layers.1.mlp.experts.down_proj"),
    "GraniteMoeForCausalLM": (
        "GraniteMoeConfig",
        {**_LLAMA, "num_local_experts": 4},
        4,
        "model.layers.1.block_sparse_moe.output_linear.weight",
    ),
}


def tiny_moe(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of about 100k weights, in evaluation mode."""
    config_class, arguments, *_ = MOE[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, config_class)(vocab_size=VOCABULARY, **special, **{**arguments, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, family)(config).eval()
    fill(model, seed)
    return model


def fill(module: nn.Module, seed: int = 0) -> None:
    """Random matrices of outputs of about the size of the inputs, and small biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            std = 0.1 if name.endswith("bias") else 0.6 / parameter.shape[-1] ** 0.5
            parameter.data.normal_(std=std, generator=generator)


def save_moe(path: Path, family: str, **changes) -> Path:
    tiny_moe(family, **changes).save_pretrained(path)
    return path


def experts_of(family: str, **changes) -> nn.Module:
    """The experts of the last layer."""
    from optimum_arb.experts.matrices import is_experts

    return [module for module in tiny_moe(family, **changes).modules() if is_experts(module)][-1]


def other_experts(name: str) -> nn.Module:
    """Modules of experts of rarer forms, alone: "no-gate", "transposed" or "norm"."""
    hidden, inner, experts = 64, 48, 4
    if name == "no-gate":
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config = transformers.NemotronHConfig(
            hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=experts, moe_latent_size=None
        )
    elif name == "transposed":
        from transformers.models.aria.modeling_aria import AriaExperts as Experts

        if not hasattr(Experts, "_apply_gate"):  # 5.16: two grouped matrix multiplications, no matrices of its own
            raise ImportError("AriaExperts of this version of transformers is of another form")

        config = transformers.AriaTextConfig(hidden_size=hidden, intermediate_size=inner, moe_num_experts=experts)
    else:
        from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
        from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts as Experts

        config = MuseSparkTextConfig(
            moe_hidden_size=hidden,
            moe_intermediate_size=inner,
            num_local_experts=experts,
            hidden_size=64,
            num_attention_heads=4,
        )
    config._experts_implementation = "eager"
    module = Experts(config)
    module.eval()
    fill(module)
    return module


def routing(tokens: int, experts: int, k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts int64 `[tokens, k]` of each token and their weights, which sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return index, torch.rand(tokens, k, generator=generator).softmax(1)
