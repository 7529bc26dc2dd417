"""Packed linear layers in vLLM: what is loaded, what a rank keeps of it, how it runs.

vLLM fuses layers that read the same input (q, k and v; gate and up). Binarized, each has its own row and column scales,
order of columns and salient columns, so a fused layer holds its parts side by side, each an `ARBLinear`, and
concatenates their outputs.

Tensor parallelism. A layer whose outputs are divided keeps those rows of each part. A layer whose inputs are divided
keeps its columns where these are whole blocks. Where they are not, above all where the columns are stored in order of
activation and each block holds columns of every rank, the rows are divided instead: the ranks gather the whole input,
each computes its share of the outputs and leaves zeros for the others', and vLLM's sum over the ranks puts them
together. That costs one all-gather of the input, and stores and computes nothing twice; keeping the rank's columns of
each block would fill the blocks up with padding, `tp` times the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from ...config import ARBConfig
from ...format.packing import STORED_NAMES
from ...nn import ARBLinear
from .packed_part import PackedPart, parameter

logger = init_logger(f"vllm.{__name__}")

_QKV = ("q", "k", "v")


@dataclass
class _Loading:
    """What a layer knows until all its tensors have arrived.

    Attributes:
        in_features: K of the whole layer.
        out_features: N of this rank, all parts.
        dtype: of the weights that are in float.
        loader: vLLM's own loader of the layer's parameters, `(parameter, tensor, shard id)`.
        parts: shard id (None: the whole layer) -> the tensors of the checkpoint by `packing.STORED_NAMES`.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    loader: Callable[..., None]
    parts: dict[Hashable, dict[str, torch.Tensor]] = field(default_factory=dict)

    def take(self, name: str, param: nn.Parameter, tensor: torch.Tensor, shard_id: Any = None) -> None:
        """The weight loader of the parameter `name`."""
        shard = tuple(shard_id) if isinstance(shard_id, list) else shard_id
        # a copy: some of vLLM's loaders reuse the memory that a tensor came in
        self.parts.setdefault(shard, {})[name] = tensor.detach().to("cpu", copy=True)


@register_weight_loader_v2_supported_method
class ARBLinearMethod(LinearMethodBase):
    """Runs one of vLLM's linear layers on packed tensors.

    Args:
        prefix: the layer's name.
        parts: name in the checkpoint and configuration (None: in float) of each layer that it is fused of, in order.
    """

    def __init__(self, prefix: str, parts: list[tuple[str, ARBConfig | None]]):
        self.prefix = prefix
        self.parts = parts

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers an empty parameter for each tensor that a packed layer may have.

        How many salient columns there are, whether there is a permutation and which dtype the scales have is known
        only from the checkpoint: the tensors are collected as they arrive.
        """
        loading = _Loading(input_size, sum(output_partition_sizes), params_dtype, extra_weight_attrs["weight_loader"])
        layer.arb_loading = loading
        for name in STORED_NAMES:
            param = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
            param.weight_loader = partial(loading.take, name)  # type: ignore[attr-defined]
            layer.register_parameter(parameter(name), param)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Replaces the parameters by this rank's parts.

        Raises:
            ValueError: a tensor is missing, or does not fit the layer or the configuration.
        """
        loading: _Loading = layer.arb_loading
        device = layer.weight.device
        for name in STORED_NAMES:
            delattr(layer, parameter(name))
        placed: list[tuple[int, nn.Linear]] = []
        layer.arb_gathered = None
        for shard, tensors in loading.parts.items():
            part, start = self._part(layer, loading, shard, tensors)
            placed.append((start, part.to(device)))
        placed.sort(key=lambda item: item[0])
        self._check_cover(loading, placed, gathered=layer.arb_gathered is not None)
        layer.arb_parts = nn.ModuleList(part for _, part in placed)
        for part in layer.arb_parts:
            if isinstance(part, ARBLinear) and part.weight.is_cuda and part.backend in ("auto", "triton"):
                part.prepare()  # vLLM compiles the first call, which then cannot do it
        layer.weight = layer.arb_parts[0].weight  # vLLM's LoRA layers ask it for the device
        del layer.arb_loading

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., inputs of this rank]` to `[..., outputs of this rank]`, of x's dtype."""
        if layer.arb_gathered is not None:
            x = tensor_model_parallel_all_gather(x)
        outputs = [part(x) for part in layer.arb_parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if layer.arb_gathered is not None:
            out = nn.functional.pad(out, layer.arb_gathered)
        return out if bias is None else out + bias

    def _part(
        self, layer: LinearBase, loading: _Loading, shard: Hashable, tensors: dict[str, torch.Tensor]
    ) -> tuple[nn.Linear, int]:
        """One part of the layer as this rank keeps it, without bias, and its first output."""
        name, config = self._identify(shard)
        weight = tensors.get("weight")
        if weight is None:
            raise ValueError(
                f"{name}: the tensor '{name}.weight' is missing in the checkpoint. Save or download the model again."
            )
        if config is None or weight.is_floating_point():
            return self._float_part(layer, loading, shard, name, config, tensors)
        packed = PackedPart.of(name, tensors, config, loading.in_features)
        rows, start = self._rows(layer, loading, shard, name, weight.shape[0])
        packed = packed.rows(rows)
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            obstacle = packed.column_obstacle(layer.tp_size)
            if obstacle is None:
                share = loading.in_features // layer.tp_size
                packed = packed.columns(layer.tp_rank * share, (layer.tp_rank + 1) * share)
            else:
                logger.info_once("%s is divided by outputs and gathers its input: %s.", name, obstacle)
                packed = packed.rows(self._share_of_outputs(layer, loading))
        return packed.linear(), start

    def _float_part(
        self,
        layer: LinearBase,
        loading: _Loading,
        shard: Hashable,
        name: str,
        config: ARBConfig | None,
        tensors: dict[str, torch.Tensor],
    ) -> tuple[nn.Linear, int]:
        """A part that stayed in float beside others that are packed (q, k and v with only v kept, say)."""
        weight = tensors["weight"]
        if config is not None or not weight.is_floating_point() or len(tensors) > 1:
            expected = "in float" if config is None else "binarized"
            raise ValueError(
                f"{name}: the quantization_config says that it is {expected}, but the checkpoint holds its weight as "
                f"{weight.dtype} {list(weight.shape)}. The configuration or the checkpoint was changed."
            )
        rows, start = self._rows(layer, loading, shard, name, weight.shape[0])
        part = nn.Linear(loading.in_features, len(rows), bias=False, device="meta")
        part.weight = nn.Parameter(weight.index_select(0, rows).to(loading.dtype), requires_grad=False)
        return part, start

    def _identify(self, shard: Hashable) -> tuple[str, ARBConfig | None]:
        """Name and configuration of the part that vLLM calls `shard`."""
        if len(self.parts) == 1:
            return self.parts[0]
        index = _QKV.index(shard) if shard in _QKV else shard
        if isinstance(index, int) and index < len(self.parts):
            return self.parts[index]
        names = ", ".join(name for name, _ in self.parts)
        raise ValueError(
            f"{self.prefix}: the checkpoint holds it as one layer (part {shard!r}), where one each of {names} was "
            "expected. This architecture is not supported by the vLLM plug-in: run it with transformers."
        )

    def _rows(
        self, layer: LinearBase, loading: _Loading, shard: Hashable, name: str, rows: int
    ) -> tuple[torch.Tensor, int]:
        """The rows of a stored part of `rows` rows that this rank keeps (int64), and where their outputs begin.

        vLLM's own loader says so, given row numbers to load in place of rows: it knows about replicated key and value
        heads and about checkpoints that are fused already.
        """
        probe = ChannelQuantScaleParameter(
            data=torch.full((loading.out_features, 1), -1, dtype=torch.int64, device="cpu"),
            output_dim=0,
            weight_loader=loading.loader,
        )
        probe.tp_rank, probe.tp_size = layer.tp_rank, layer.tp_size
        numbers = torch.arange(rows, device="cpu")[:, None]
        try:
            loading.loader(probe, numbers, *(() if shard is None else (shard,)))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{name}: the checkpoint holds {rows} rows, which do not fit the model's {loading.out_features} "
                f"outputs on each of {layer.tp_size} ranks ({error}). The model's config.json or its weights were "
                "changed."
            ) from error
        kept = probe.data[:, 0]
        places = (kept >= 0).nonzero()[:, 0]
        start, picked = int(places[0]), kept[places]
        # the last rank keeps the last row, whatever is replicated
        if layer.tp_rank == layer.tp_size - 1 and int(picked.max()) != rows - 1:
            raise ValueError(
                f"{name}: the checkpoint holds {rows} rows, of which the model takes {int(picked.max()) + 1}. The "
                "model's config.json or its weights were changed."
            )
        return picked, start

    def _share_of_outputs(self, layer: LinearBase, loading: _Loading) -> torch.Tensor:
        """The outputs that this rank computes where the input is gathered; sets the zeros around them."""
        total, ranks, rank = loading.out_features, layer.tp_size, layer.tp_rank
        start, stop = total * rank // ranks, total * (rank + 1) // ranks
        layer.arb_gathered = (start, total - stop)
        return torch.arange(start, stop, device="cpu")

    def _check_cover(self, loading: _Loading, placed: list[tuple[int, nn.Linear]], gathered: bool) -> None:
        """Whether the parts are all there: each begins where the one before ends, and all outputs are computed."""
        end = 0
        for start, part in placed:
            if start != end:
                break
            end += part.out_features
        if end != loading.out_features and not gathered:
            names = ", ".join(name for name, _ in self.parts)
            raise ValueError(
                f"{self.prefix}: the checkpoint holds only {sum(p.out_features for _, p in placed)} "
                f"of the {loading.out_features} outputs of {names}. Save or download the model again."
            )
