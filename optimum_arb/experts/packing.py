"""The packed matrices of all experts in one set of tensors, and one of them out of it.

Each part of each expert is a packed weight of `optimum_arb.format.packing`; parts follow each other along the second to
last dimension, experts along the first. So the tensors of an expert are slices, and cutting every tensor in as many
pieces along dimension 1 as there are parts gives the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..config import ARBConfig
from ..format import packing
from ..format.layout import Layout
from .matrices import ExpertMatrix


@dataclass(frozen=True)
class PackedForm:
    """What the packed tensors of the experts mean.

    Attributes:
        layout: the terms of every weight.
        block_size: columns that share a row scale.
        experts: E.
        parts: matrices of an expert that lie below each other.
        out_features: N, of all parts together.
        in_features: K.
    """

    layout: Layout
    block_size: int
    experts: int
    parts: int
    out_features: int
    in_features: int

    def shapes(self, permuted: bool, salient: int = 0) -> dict[str, tuple[int, int, int]]:
        """The shape of every tensor, as `optimum_arb.format.packing.packed_shapes` says it for one weight."""
        rows = self.out_features // self.parts
        one = packing.packed_shapes(self.layout, rows, self.in_features, self.block_size, permuted, salient)
        return {name: (self.experts, self.parts * shape[0], shape[1]) for name, shape in one.items()}


def packed_form(matrix: ExpertMatrix, config: ARBConfig) -> PackedForm:
    """What the packed tensors of a matrix mean under a configuration."""
    return PackedForm(
        config.layout, config.block_size, matrix.experts, matrix.parts, matrix.out_features, matrix.in_features
    )


def stack_experts(packed: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The packed weights of all experts, part by part of each, in one set of tensors.

    Args:
        packed: of every expert, its parts, as `optimum_arb.format.packing.pack` returns them: all of one shape and
            layout. Where some have a permutation, the others get the one that leaves the columns where they are.

    Returns:
        Tensors of three dimensions by the names of `optimum_arb.format.packing.TENSOR_NAMES`. Scales are float32 where
        float16 cannot hold those of some expert.

    Raises:
        ValueError: the weights differ in the number of salient columns.
    """
    flat = [tensors for parts in packed for tensors in parts]
    counts = {tensors["salient_columns"].shape[1] for tensors in flat if "salient_columns" in tensors}
    if len(counts) > 1:
        raise ValueError(
            f"the experts have {min(counts)} to {max(counts)} salient columns, and one tensor needs one number: set "
            "salient_columns to a number, or to 0"
        )
    known = {name: tensors[name] for tensors in flat for name in tensors}
    if "permutation" in known:
        known["permutation"] = torch.arange(known["permutation"].shape[1]).to(known["permutation"])[None]
    stacked = {}
    for name in (name for name in packing.TENSOR_NAMES if name in known):
        dtypes = {tensors[name].dtype for tensors in flat if name in tensors}
        dtype = torch.float32 if len(dtypes) > 1 else dtypes.pop()
        rows = [torch.cat([tensors.get(name, known[name]).to(dtype) for tensors in parts]) for parts in packed]
        stacked[name] = torch.stack(rows)
    return stacked


def expert_part(tensors: Mapping[str, torch.Tensor], form: PackedForm, expert: int, part: int) -> dict:
    """The tensors of one part of one expert, views, as `optimum_arb.format.packing.pack` returns them."""
    result = {}
    for name, tensor in tensors.items():
        rows = tensor.shape[1] // form.parts
        result[name] = tensor[expert, part * rows : (part + 1) * rows]
    return result


def expert_dequantized(
    tensors: Mapping[str, torch.Tensor], form: PackedForm, expert: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight `[N, K]` of one expert in `dtype`."""
    parts = []
    for part in range(form.parts):
        own = expert_part(tensors, form, expert, part)
        parts.append(packing.unpack(own, form.layout, form.in_features, form.block_size).dequantize(dtype))
    return torch.cat(parts)
