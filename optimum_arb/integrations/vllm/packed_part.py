"""A packed weight as the checkpoint holds it: what of it a rank keeps, and the layer that runs it. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import ARBConfig
from ...format.factors import INNER, INNER_LAYOUT, SCALE_GRIDS
from ...format.scales import decoded, scale_grids
from ...format.slicing import column_obstacle, slice_columns, slice_rows
from ...nn import ARBFactorizedLinear, ARBLinear
from ...stored.linears import StoredLinear, describe
from ...stored.tensors import StoredTensor

_HEADER_DTYPES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int16: "I16",
    torch.int32: "I32",
}


@dataclass(frozen=True)
class PackedPart:
    """A packed weight `[N, K]`, or some of its rows or columns.

    Attributes:
        tensors: by `packing.STORED_NAMES`; scales of 8 bits decoded to float16, which they are run in.
        in_features: K.
        form: what `stored.linears.describe` says of it.
    """

    tensors: dict[str, torch.Tensor]
    in_features: int
    form: dict[str, Any]

    @classmethod
    def of(cls, name: str, tensors: dict[str, torch.Tensor], config: ARBConfig, in_features: int) -> PackedPart:
        """The whole weight.

        Args:
            name: of the module in the checkpoint.
            tensors: of the checkpoint by `packing.STORED_NAMES`, the weight among them.
            config: of this module.
            in_features: K.

        Raises:
            ValueError: a tensor is missing, unknown to the layout, or of the wrong shape or dtype.
        """
        headers = {
            key: StoredTensor(tuple(tensor.shape), _HEADER_DTYPES.get(tensor.dtype, str(tensor.dtype)))
            for key, tensor in tensors.items()
        }
        form = describe(StoredLinear(name, headers), config, tensors["weight"].shape[0], in_features)
        return cls(decoded(tensors, SCALE_GRIDS if "rank" in form else scale_grids(form["layout"])), in_features, form)

    @property
    def is_factorized(self) -> bool:
        """Whether it is a product of two sign matrices."""
        return "rank" in self.form

    @property
    def block_size(self) -> int:
        return -1 if self.is_factorized else self.form["block_size"]

    def rows(self, rows: torch.Tensor) -> PackedPart:
        """These rows (int64 `[n]`), in this order. Of two factors the inner one is kept as a whole."""
        return replace(self, tensors=slice_rows(self.tensors, rows))

    def column_obstacle(self, parts: int) -> str | None:
        """Why it cannot be cut into so many equal ranges of columns; None where it can."""
        return column_obstacle(self.tensors, self.in_features, self.block_size, parts)

    def columns(self, start: int, stop: int) -> PackedPart:
        """The columns from `start` to `stop`, where there is no obstacle. Of two factors the outer one is kept as a
        whole: the product is linear in its inputs, so the sum over ranks is the whole product for both."""
        if not self.is_factorized:
            cut = slice_columns(self.tensors, self.form["layout"], self.in_features, self.block_size, start, stop)
            return PackedPart(cut, stop - start, self.form)
        inner = {name: self.tensors[key] for name, key in INNER.items()}
        cut = slice_columns(inner, INNER_LAYOUT, self.in_features, -1, start, stop)
        tensors = self.tensors | {INNER[name]: tensor for name, tensor in cut.items()}
        return PackedPart(tensors, stop - start, self.form)

    def linear(self) -> ARBLinear:
        """The layer of these tensors, without a bias."""
        rows, backend = self.tensors["weight"].shape[0], self.form["backend"]
        choices: dict[str, Any] = {"bias": False, "backend": backend, "device": "meta"}
        part: ARBLinear
        if self.is_factorized:
            part = ARBFactorizedLinear(self.in_features, rows, self.form["rank"], **choices)
        else:
            salient = self.tensors.get("salient_columns")
            choices |= {key: self.form[key] for key in ("layout", "block_size", "hadamard")}
            choices |= {"permuted": "permutation" in self.tensors, "salient": 0 if salient is None else len(salient[0])}
            part = ARBLinear(self.in_features, rows, **choices)
        part.load_state_dict({parameter(key): each.contiguous() for key, each in self.tensors.items()}, assign=True)
        return part


def parameter(name: str) -> str:
    """The name of a packed tensor's parameter, and of its key in a checkpoint."""
    return name if name == "weight" else f"weight_{name}"
