"""The packed weights of all experts, as the operator hands them to a backend, and their product expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...format.layout import Layout
from ...format.packing import TENSOR_NAMES
from .packed import PackedWeight, compute_dtype


@dataclass(frozen=True)
class PackedExperts:
    """Weights `[E, N, K]` in their packed form: the tensors of `optimum_arb.experts.packing` and what they mean."""

    layout: Layout
    block_size: int
    parts: int
    in_features: int
    weight: torch.Tensor
    row_scale: torch.Tensor
    col_scale: torch.Tensor | None = None
    permutation: torch.Tensor | None = None
    salient_columns: torch.Tensor | None = None
    salient_weight: torch.Tensor | None = None
    salient_col_scale: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def check(self, offsets: torch.Tensor) -> None:
        """Raises ValueError where the tensors do not fit each other."""
        if self.weight.dim() != 3 or self.parts < 1 or self.out_features % self.parts:
            raise ValueError(
                f"The packed experts are {list(self.weight.shape)} in {self.parts} parts: they must be [experts, "
                "out_features, bytes], out_features a multiple of the parts."
            )
        if offsets.shape != self.weight.shape[:1] or offsets.is_floating_point():
            raise ValueError(
                f"The offsets are {offsets.dtype} {list(offsets.shape)}: they must be one integer for each of the "
                f"{self.weight.shape[0]} experts, the end of its rows."
            )
        if self.weight.shape[0]:
            self.matrix(0, 0).check()

    def matrix(self, expert: int, part: int) -> PackedWeight:
        """One part of one expert, as views."""
        tensors = {}
        for name in TENSOR_NAMES:
            tensor = getattr(self, name)
            if tensor is not None:
                rows = tensor.shape[1] // self.parts
                tensors[name] = tensor[expert, part * rows : (part + 1) * rows]
        return PackedWeight(self.layout, self.block_size, self.in_features, **tensors)


Product = Callable[[torch.Tensor, PackedWeight], torch.Tensor]


def linear(x: torch.Tensor, offsets: torch.Tensor, packed: PackedExperts, product: Product) -> torch.Tensor:
    """Each expert's rows of x times its weight, one after the other. Waits for the offsets.

    Args:
        x: `[M, K]`, rows sorted by expert.
        offsets: integers `[E]`, where the rows of each expert end.
        packed: the weights.
        product: `x W^T` of one weight.

    Returns:
        `[M, N]` of x's dtype; rows past the last expert's are 0.
    """
    out = x.new_zeros(x.shape[0], packed.out_features)
    width = packed.out_features // packed.parts
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            for part in range(packed.parts):
                rows = product(x[start:stop], packed.matrix(expert, part))
                out[start:stop, part * width : (part + 1) * width] = rows
        start = stop
    return out


def input_grad(grad: torch.Tensor, offsets: torch.Tensor, packed: PackedExperts, product: Product) -> torch.Tensor:
    """The gradient of the input of `linear`, `[M, K]` from `[M, N]`, where `product` is `grad W` of one weight.

    Parts are summed in float32.
    """
    out = grad.new_zeros(grad.shape[0], packed.in_features)
    width = packed.out_features // packed.parts
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            rows = grad[start:stop].to(compute_dtype(grad.dtype))
            total = product(rows[:, :width], packed.matrix(expert, 0))
            for part in range(1, packed.parts):
                own = rows[:, part * width : (part + 1) * width]
                total = total + product(own, packed.matrix(expert, part))
            out[start:stop] = total.to(grad.dtype)
        start = stop
    return out
