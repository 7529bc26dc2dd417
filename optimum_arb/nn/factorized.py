"""`ARBFactorizedLinear`: a linear layer whose weight is a chain of two sign matrices."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ..format import factors
from ..format.factors import INNER, INNER_LAYOUT, OUTER, OUTER_LAYOUT, FactorizedWeight
from ..format.packing import BinarizedWeight
from .compiled import Facts
from .linear import ARBLinear
from .prepared_layers import is_offloaded
from .product import PackedProduct


class InnerProduct(PackedProduct):
    """The first of the two products of a layer: `diag(rank_scale) B diag(col_scale) x`, without a bias.

    No module: its tensors are parameters of the layer.
    """

    layout = INNER_LAYOUT
    block_size = -1
    bias = None

    def __init__(self, layer: ARBFactorizedLinear):
        # weak: a layer that is let go of is to free its memory at once, not when Python's collector of cycles runs next
        self._layer = weakref.ref(layer)
        self.out_features = layer.rank
        self.shared_input = None
        self.shared_index = 0
        self._prepared = None
        self._looked = False

    @property
    def layer(self) -> ARBFactorizedLinear:
        """The layer, which holds this object."""
        layer = self._layer()
        assert layer is not None
        return layer

    @property
    def module(self) -> ARBFactorizedLinear:
        return self.layer

    @property
    def backend(self) -> str:  # type: ignore[override]
        return self.layer.backend

    @property
    def columns(self) -> int:
        return self.layer.in_features

    @property
    def is_offloaded(self) -> bool:
        return is_offloaded(self.layer)

    def operand(self, name: str) -> torch.Tensor | None:
        return self.layer.taken(INNER[name]) if name in INNER else None

    def _watched(self) -> list[tuple[dict[str, Any], str]]:
        return self.layer._watched()


class ARBFactorizedLinear(ARBLinear):
    """`y = x W^T + bias` with `W = diag(a) A diag(m) B diag(b)`, A and B of signs: two products of packed matrices.

    What lies between them has the dtype of x. The packed tensors are parameters without gradients: `weight` (A) and
    `weight_row_scale` (a), `weight_inner` (B), `weight_inner_row_scale` (m) and `weight_inner_col_scale` (b), those of
    `optimum_arb.format.factors.pack_factors`.

    Args:
        in_features: K.
        out_features: N.
        rank: r, the rows of B and the columns of A.
        bias: whether there is one.
        scale_dtypes: dtypes of "row_scale", "inner_row_scale" and "inner_col_scale" where they are not float16 (uint8,
            of scales of 8 bits).
        backend: as for `ARBLinear`.
        dtype: of the bias; None is torch's default.
        device: of all tensors.
        scale_bits: 16 or 8, of a stored scale.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        scale_dtypes: Mapping[str, torch.dtype] | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        scale_bits: int = 16,
    ):
        if rank < 1:
            raise ValueError(f"rank={rank} is no rank of a product of two matrices: it must be at least 1.")
        self._begin(in_features, out_features, OUTER_LAYOUT, -1, backend)
        self.rank = rank
        self._inner = InnerProduct(self)
        shapes = factors.factor_shapes(out_features, in_features, rank, scale_bits)
        self._set_empty(shapes, scale_dtypes or {}, bias, dtype, device)

    @classmethod
    def from_factorized(
        cls, weight: FactorizedWeight, bias: torch.Tensor | None = None, backend: str = "auto", scale_bits: int = 16
    ) -> ARBFactorizedLinear:
        """The layer of a factorized weight, on the device of its signs.

        Args:
            weight: what an algorithm returned.
            bias: `[N]`, or None; kept in its dtype, on the weight's device.
            backend: as for `ARBLinear`.
            scale_bits: as for `optimum_arb.format.factors.pack_factors`.
        """
        rows, columns = weight.shape
        choices: dict[str, Any] = {"backend": backend, "scale_bits": scale_bits}
        choices |= {"bias": bias is not None, "dtype": None if bias is None else bias.dtype}
        layer = cls(columns, rows, weight.rank, device="meta", **choices)
        layer._fill(factors.pack_factors(weight, scale_bits), bias, weight.device)
        return layer

    @property
    def layout_name(self) -> str:
        return factors.LAYOUT_NAME

    @property
    def columns(self) -> int:
        return self.rank

    @property
    def first_product(self) -> PackedProduct:
        return self._inner

    def operand(self, name: str) -> torch.Tensor | None:
        return self.taken(name) if name in OUTER else None

    def _described(self) -> tuple[Facts, Facts | None]:
        if "_inner" not in self.__dict__:  # of a copy
            self._inner = InnerProduct(self)
        outer = {name: name for name in OUTER}
        return self._facts_of(self._inner, INNER, None), self._facts_of(self, outer, "bias")

    def _operands(self) -> list[torch.Tensor | None]:
        return PackedProduct._operands(self)  # not the linear's, which reads the parameters of one matrix

    def _present(self) -> tuple[torch.Tensor, ...]:
        return PackedProduct._present(self)

    @property
    def _grids(self) -> dict[str, int]:
        return factors.SCALE_GRIDS

    def factorized(self) -> FactorizedWeight:
        """The weight unpacked."""
        return factors.unpack_factors(self.packed(), self.in_features)

    def binarized(self) -> BinarizedWeight:
        """
        Raises:
            TypeError: a product of two sign matrices is no sum of sign planes; `factorized` unpacks it.
        """
        raise TypeError("This weight is a product of two sign matrices: unpack it with factorized() or dequantize().")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.factorized().dequantize(dtype)

    def _product(self, x: torch.Tensor, join: bool = True) -> torch.Tensor:
        return super()._product(self._inner._product(x, join))

    def forget(self) -> None:
        super().forget()
        if "_inner" in self.__dict__:
            self._inner.forget()

    def prepare(self) -> None:
        super().prepare()
        self._inner.prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_inner"}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, layout={self.layout_name}, bits_per_weight={self.bits_per_weight():.3f}, "
            f"backend={self.backend}"
        )


def packed_linear(
    weight: BinarizedWeight | FactorizedWeight,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
    scale_bits: int = 16,
) -> ARBLinear:
    """The layer of what an algorithm returned, see `ARBLinear.from_binarized` and `ARBFactorizedLinear`."""
    if isinstance(weight, FactorizedWeight):
        return ARBFactorizedLinear.from_factorized(weight, bias, backend, scale_bits)
    return ARBLinear.from_binarized(weight, bias, backend, scale_bits)
