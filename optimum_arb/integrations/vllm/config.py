"""What vLLM asks about a binarized model: which of its layers are packed, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ...config import ARBConfig
from ...modules import ROUTER_NAMES
from ...patterns import matches

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from .experts import ARBExpertsMethod


@register_quantization_config("arb")
class ARBServingConfig(QuantizationConfig):
    """The `quantization_config` of a binarized model, as vLLM reads it.

    Args:
        config: the configuration that the model was saved with.
    """

    def __init__(self, config: ARBConfig):
        super().__init__()
        self.config = config

    def __repr__(self) -> str:
        return f"ARBServingConfig(method={self.config.method!r}, bits_per_weight={self.config.bits_per_weight})"

    def get_name(self) -> str:
        return "arb"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ARBServingConfig:
        """From the `quantization_config` of config.json.

        Raises:
            ValueError, TypeError: it has an unknown key or value, or is of a newer format.
        """
        return cls(ARBConfig.from_dict(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer runs: packed, in float, or, for what is no linear layer, as vLLM pleases (None).

        Raises:
            ValueError: of a layer's experts one matrix is binarized and the other in float.
        """
        # here and not above: they bring in vLLM's kernels, which a process that only reads configurations never needs
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .linear import ARBLinearMethod

        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = {name: self.module_config(name) for name in self.part_names(prefix)}
        if all(config is None for config in parts.values()):
            return UnquantizedLinearMethod()
        return ARBLinearMethod(prefix, list(parts.items()))

    def part_names(self, prefix: str) -> list[str]:
        """The names in the checkpoint of the layers that vLLM's layer of this name is fused of, or the name itself."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def module_config(self, *names: str) -> ARBConfig | None:
        """The configuration of a linear layer of the checkpoint, or of experts; None where it stayed in float.

        Args:
            names: what patterns may match: the layer's name; of experts, a parameter's and the module's.
        """
        if names[0].rpartition(".")[2] in ROUTER_NAMES:
            return None
        if any(matches(pattern, name) for pattern in self.config.modules_to_not_convert or () for name in names):
            return None
        return self.config.for_module(*names)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> ARBExpertsMethod | None:
        """How the routed experts of a layer run: packed, or as vLLM runs them in float (None)."""
        from .experts import ARBExpertsMethod

        # patterns are about transformers' names, in which every family's mixture is called mlp since 5.0
        block, _, experts = prefix.rpartition(".")
        names = [prefix, f"{block.rpartition('.')[0]}.mlp.{experts}"]
        configs = {}
        for matrix, key in (("w13", "gate_up_proj"), ("w2", "down_proj")):
            configs[matrix] = self.module_config(*(f"{name}.{key}" for name in names), *names)
        packed = {matrix: config for matrix, config in configs.items() if config is not None}
        if not packed:
            return None
        if len(packed) < len(configs):
            raise ValueError(
                f"{prefix}: one matrix of its experts is binarized and the other in float, which the vLLM plug-in does "
                "not run. Run the model with transformers, or binarize both or none."
            )
        return ARBExpertsMethod(layer.moe_config, prefix, packed)
