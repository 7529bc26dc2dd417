"""Binarized experts in vLLM: what is loaded, which of them a rank keeps, how they run.

vLLM would divide the inner size of every expert between the ranks, which cuts through the blocks of packed columns.
Instead each rank keeps whole experts, a share of them, and vLLM's sum over the ranks puts their outputs together: the
same bits are stored and read, and nothing is exchanged that would not be anyway. With expert parallelism the experts
are those that vLLM gives the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ...config import ARBConfig
from ...experts.packing import PackedForm, stack_experts
from ...experts.routing import route, weighted_sum
from ...format.packing import STORED_NAMES, TENSOR_NAMES
from ...ops import grouped_linear
from .packed_part import PackedPart, parameter

_MATRICES = ("w13", "w2")
# vLLM's names of an expert's linears -> the matrix, in the order of its parts
_SHARDS = {"w1": "w13", "w3": "w13", "w2": "w2"}
_ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


class PackedMatrix(nn.Module):
    """One matrix of each of this rank's experts.

    Args:
        form: what the tensors mean.
        tensors: by `packing.TENSOR_NAMES`, of three dimensions, as `stack_experts` makes them.
        backend: of the operator.
    """

    def __init__(self, form: PackedForm, tensors: dict[str, torch.Tensor], backend: str):
        super().__init__()
        self.form, self.backend = form, backend
        for name in TENSOR_NAMES:
            self.register_parameter(name, None)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """`[M, K]`, rows sorted by expert, to `[M, N]`."""
        tensors: dict[str, Any] = {name: self._parameters[name] for name in TENSOR_NAMES}
        choices: dict[str, Any] = {"layout": self.form.layout.name, "block_size": self.form.block_size}
        return grouped_linear(x, offsets, **tensors, **choices, parts=self.form.parts, backend=self.backend)


class ARBExpertsMethod(FusedMoEMethodBase):
    """Runs the routed experts of one layer on packed tensors.

    Args:
        moe: what vLLM knows of them.
        prefix: the layer's name.
        configs: of the matrices "w13" (gate and up) and "w2" (down).
    """

    def __init__(self, moe: FusedMoEConfig, prefix: str, configs: dict[str, ARBConfig]):
        super().__init__(moe)
        self.prefix = prefix
        self.configs = configs

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers an empty parameter for each tensor that a packed matrix may have: they are collected as they
        arrive, of this rank's experts alone.

        Raises:
            ValueError: an activation, biases, or a way to divide a model that packed experts do not have here.
        """
        self._check(layer)
        layer.arb_experts = self._experts_of_rank(layer)
        layer.arb_loading = {}
        for matrix in _MATRICES:
            for name in STORED_NAMES:
                param = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                param.weight_loader = partial(_take, layer, name)  # type: ignore[attr-defined]
                layer.register_parameter(f"{matrix}_{parameter(name)}", param)

    def _check(self, layer: RoutedExperts) -> None:
        data_parallel = self.moe.moe_parallel_config.dp_size
        obstacles = {
            f"their activation is {layer.activation.value}": layer.activation not in _ACTIVATIONS,
            "their activation is clamped": layer.swiglu_limit is not None,
            "their linears have biases": self.moe.has_bias,
            "their inputs are weighted, not their outputs": layer.apply_router_weight_on_input,
            f"the data parallel size is {data_parallel} (tensor_parallel_size divides them)": data_parallel > 1,
        }
        found = [obstacle for obstacle, there in obstacles.items() if there]
        if found:
            raise ValueError(
                f"{self.prefix}: the vLLM plug-in does not run these binarized experts: {', '.join(found)}. Run the "
                "model with transformers, or binarize it with modules_to_not_convert=['experts']."
            )

    def _experts_of_rank(self, layer: RoutedExperts) -> list[int]:
        """The numbers of the experts that this rank keeps."""
        total, parallel = layer.global_num_experts, self.moe.moe_parallel_config
        if parallel.use_ep:
            experts = layer.expert_map_manager.expert_map
            return list(range(total)) if experts is None else (experts >= 0).nonzero()[:, 0].tolist()
        ranks, rank = parallel.tp_size, parallel.tp_rank
        return list(range(total * rank // ranks, total * (rank + 1) // ranks))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Replaces the parameters by the packed matrices.

        Raises:
            ValueError: a tensor is missing, or does not fit the layer or the configuration.
        """
        device = layer.w13_weight.device
        for matrix in _MATRICES:
            for name in STORED_NAMES:
                delattr(layer, f"{matrix}_{parameter(name)}")
        experts: list[int] = layer.arb_experts
        # global number -> place among this rank's, their number for all others
        local = torch.full((layer.global_num_experts,), len(experts), dtype=torch.int64)
        local[experts] = torch.arange(len(experts))
        layer.register_buffer("arb_local", local.to(device), persistent=False)
        inner = self.moe.intermediate_size  # of all ranks
        sizes = {"w13": (inner, layer.hidden_size), "w2": (layer.hidden_size, inner)}
        layer.arb_matrices = nn.ModuleDict()
        for matrix, (rows, columns) in sizes.items():
            packed = self._matrix(layer, matrix, rows, columns) if experts else None
            if packed is not None:
                layer.arb_matrices[matrix] = packed.to(device)
        del layer.arb_loading

    def _matrix(self, layer: RoutedExperts, matrix: str, rows: int, columns: int) -> PackedMatrix:
        config = self.configs[matrix]
        shards = [shard for shard, of in _SHARDS.items() if of == matrix]
        packed: list[list[dict[str, torch.Tensor]]] = []
        part: PackedPart | None = None
        for expert in layer.arb_experts:
            packed.append([])
            for shard in shards:
                tensors = layer.arb_loading.get((expert, shard), {})
                name = f"{self.prefix}.{expert}.{shard}"
                if "weight" not in tensors or tensors["weight"].is_floating_point():
                    found = "in float" if "weight" in tensors else "missing"
                    raise ValueError(
                        f"{name}: its weight is {found} in the checkpoint, but the quantization_config says that it is "
                        "binarized. One of the two was changed, or the vLLM plug-in does not know how this "
                        "architecture stores its experts: run the model with transformers."
                    )
                part = PackedPart.of(name, tensors, config, columns)
                if part.is_factorized or part.form["hadamard"]:
                    raise ValueError(f"{name}: packed experts are sums of sign planes. The configuration was changed.")
                if tensors["weight"].shape[0] != rows:
                    raise ValueError(
                        f"{name}: the checkpoint holds {tensors['weight'].shape[0]} rows, the model has {rows}. The "
                        "model's config.json or its weights were changed."
                    )
                packed[-1].append(part.tensors)
        assert part is not None
        form = PackedForm(part.form["layout"], part.block_size, len(packed), len(shards), rows * len(shards), columns)
        return PackedMatrix(form, stack_experts(packed), part.form["backend"])

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of the outputs of each token's experts on this rank, `[T, H]` of x's dtype."""
        if not layer.arb_experts:
            return torch.zeros_like(x)
        routed = route(layer.arb_local[topk_ids.long()], len(layer.arb_experts))
        gate, up = layer.arb_matrices["w13"](x[routed.rows], routed.offsets).chunk(2, -1)
        out = layer.arb_matrices["w2"](_ACTIVATIONS[layer.activation](gate) * up, routed.offsets)
        return weighted_sum(out, routed, topk_weights).to(x.dtype)


def _take(
    layer: RoutedExperts,
    name: str,
    param: nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """The weight loader of a parameter of this name of `packing.STORED_NAMES`."""
    kept = expert_id in layer.arb_experts
    if kept:
        # a copy: some of vLLM's loaders reuse the memory that a tensor came in
        layer.arb_loading.setdefault((expert_id, shard_id), {})[name] = loaded_weight.detach().to("cpu", copy=True)
    return kept if return_success else None
