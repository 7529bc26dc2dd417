"""The tensors of one packed linear layer, as the operator hands them to a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...format.layout import Layout
from ...format.packing import BinarizedWeight, packed_bytes, tile_width, unpack


@dataclass  # frozen takes three times as long to make, at every call of a layer
class PackedWeight:
    """A weight `[N, K]` in its packed form: the tensors of `optimum_arb.format.packing.pack` and what they mean.

    Scales may have any floating dtype; the others are as stored.
    """

    layout: Layout
    block_size: int
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
        return self.weight.shape[0]

    def check(self) -> None:
        """Raises ValueError where the tensors are not those of this layout for `in_features` columns."""
        expected = self.layout.planes * packed_bytes(self.in_features, tile_width(self.block_size))
        if self.weight.dtype != torch.uint8 or self.weight.dim() != 2 or self.weight.shape[1] != expected:
            raise ValueError(
                f"The packed weight is {self.weight.dtype} {list(self.weight.shape)}, but the input has "
                f"{self.in_features} features: layout {self.layout.name!r} with block_size={self.block_size} needs "
                f"torch.uint8 [out_features, {expected}]. Pass the input that this layer was packed for."
            )

    def rows(self, start: int, stop: int) -> PackedWeight:
        """The weight's rows from `start` to `stop`."""
        salient = self.salient_weight
        return replace(
            self,
            weight=self.weight[start:stop],
            row_scale=self.row_scale[start:stop],
            salient_weight=None if salient is None else salient[start:stop],
        )

    def unpack(self) -> BinarizedWeight:
        names = ("weight", "row_scale", "col_scale", "permutation", "salient_columns", "salient_weight")
        tensors = {name: getattr(self, name) for name in (*names, "salient_col_scale")}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return unpack(present, self.layout, self.in_features, self.block_size)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in for inputs of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
