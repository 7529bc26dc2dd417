"""`ARBLinear`: a linear layer whose weight is stored and run packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..format import packing
from ..format.layout import Layout, form_name
from ..format.packing import BinarizedWeight
from ..ops.autocast import autocast_input, is_any_autocast_enabled
from ..ops.streams import finish
from .compiled import compiled_product
from .input_transform import InputTransform
from .packed_parameters import PackedParameters
from .product import PackedProduct


class ARBLinear(PackedParameters, nn.Linear):  # type: ignore[misc]  # `bias` is declared in both
    """`y = x W^T + bias` with a binarized weight.

    The packed tensors are parameters without gradients, all of two dimensions: `weight` (uint8) and, where the layout
    has them, `weight_row_scale`, `weight_col_scale`, `weight_permutation`, `weight_salient_columns`,
    `weight_salient_weight` and `weight_salient_col_scale`, the tensors of `optimum_arb.format.packing.pack`. A new
    layer's are empty: `from_binarized` or `load_state_dict` fill them. `nn.Linear` is the base class for `isinstance`
    alone.

    Scales of 8 bits are parameters of codes, with their `weight_scale_grid`; the float16 scales that the operator takes
    are buffers beside them, `decoded_row_scale` and so on, which state dicts and files do not have. The next call
    decodes codes anew that were replaced, moved, loaded or written (`weight_row_scale.copy_()`). A write into their
    `.data` leaves no trace that a call could see without reading the codes: call `decode_stored()` behind it.

    Args:
        in_features: K.
        out_features: N.
        layout: the terms of the weight.
        block_size: columns that share a row scale: 64, a multiple of 128, or -1.
        bias: whether there is one.
        permuted: whether the columns are permuted.
        salient: the number of salient columns.
        scale_dtypes: dtypes of "row_scale", "col_scale" and "salient_col_scale" where they are not float16 (uint8, of
            scales of 8 bits).
        backend: "auto", "triton", "cpu", "reference", or "dequantize" (keeps a dequantized copy of the weight: fast,
            and no memory saved). It may be set later too.
        dtype: of the bias; None is torch's default.
        device: of all tensors.
        scale_bits: 16 or 8, of a stored scale.
        hadamard: columns of the blocks of a Hadamard transform of the input (`optimum_arb.format.hadamard`), 0 for
            none; its signs are the parameter `weight_input_signs` and the buffer `decoded_input_signs`.

    Raises:
        ValueError: a block size that cannot be packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: Layout,
        block_size: int,
        *,
        bias: bool,
        permuted: bool,
        salient: int = 0,
        scale_dtypes: Mapping[str, torch.dtype] | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        scale_bits: int = 16,
        hadamard: int = 0,
    ):
        packing.check_block_size(block_size)
        self._begin(in_features, out_features, layout, block_size, backend)
        self.hadamard = hadamard
        shapes = packing.packed_shapes(
            layout, out_features, in_features, block_size, permuted, salient, scale_bits, hadamard
        )
        self._set_empty(shapes, scale_dtypes or {}, bias, dtype, device)

    def _begin(self, in_features: int, out_features: int, layout: Layout, block_size: int, backend: str) -> None:
        super()._begin(in_features, out_features, layout, block_size, backend)
        self._dequantized: torch.Tensor | None = None
        self._dequantized_from: tuple[Any, ...] | None = None

    @classmethod
    def from_binarized(
        cls, weight: BinarizedWeight, bias: torch.Tensor | None = None, backend: str = "auto", scale_bits: int = 16
    ) -> ARBLinear:
        """The layer of a binarized weight, on the device of its signs.

        Args:
            weight: what an algorithm returned.
            bias: `[N]`, or None; kept in its dtype, on the weight's device.
            backend: as for the class.
            scale_bits: as for `optimum_arb.format.packing.pack`.
        """
        tensors = packing.pack(weight, scale_bits)
        rows, columns = weight.shape
        layer = cls(
            columns,
            rows,
            weight.layout,
            weight.block_size,
            bias=bias is not None,
            permuted=weight.permutation is not None,
            salient=0 if weight.salient_columns is None else len(weight.salient_columns),
            backend=backend,
            dtype=None if bias is None else bias.dtype,
            device="meta",
            scale_bits=scale_bits,
            hadamard=weight.hadamard,
        )
        layer._fill(tensors, bias, weight.signs.device)
        return layer

    def reset_parameters(self) -> None:
        """Does nothing: a binarized weight has no random initialization."""

    @property
    def layout_name(self) -> str:
        """The name of the form of the weight, as reports have it."""
        return form_name(self.layout.name, self.hadamard)

    @property
    def columns(self) -> int:
        """Columns of the matrix `weight`."""
        return self.in_features

    @property
    def first_product(self) -> PackedProduct:
        """The product that the layer's input enters: this, where the weight is one matrix."""
        return self

    def input_transform(self) -> InputTransform | None:
        if not self.hadamard:
            return None
        sign = self._buffers["decoded_input_signs"]
        assert sign is not None
        return InputTransform(self.packed_parameter("permutation"), sign, self.hadamard, self.backend)

    def binarized(self) -> BinarizedWeight:
        """The weight unpacked."""
        return packing.unpack(self.packed(), self.layout, self.in_features, self.block_size, self.hadamard)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[out_features, in_features]` in `dtype`, columns in the order of the inputs."""
        return self.binarized().dequantize(dtype)

    def bits_per_weight(self) -> float:
        """All stored bits of the weight over its number of weights."""
        return packing.bits_per_weight(self.packed(), self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]`, of any floating dtype, to `[..., out_features]` of that dtype.

        Under autocast the input is cast as that of `nn.Linear` is, and the result has autocast's dtype.
        """
        compiling, given = torch.compiler.is_compiling(), x
        if compiling or is_any_autocast_enabled():
            x = autocast_input(given)
        if self.backend == "dequantize":
            weight = self._cached_weight(x.dtype)
            return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        # layers of one input know it by the tensor, and each makes a cast of its own
        join = x is given
        if compiling:
            return compiled_product(self, x, join)
        if self._coded and self._codes() != self._decoded_from:
            self.forget()
            self.decode_stored()
        return self._product(x, join)

    # The dequantized copy of backend="dequantize". It is no parameter and no buffer: state dicts do not have it.

    def _cached_weight(self, dtype: torch.dtype) -> torch.Tensor:
        # while compiling, addresses and versions cannot be looked at: the hooks below drop what has become stale
        tracing = torch.compiler.is_compiling()
        cached = self._dequantized
        source = None if tracing else self._source()
        if cached is None or cached.dtype != dtype or not (tracing or source == self._dequantized_from):
            # a tensor of inference mode could not be used for a gradient later
            with torch.inference_mode(False), torch.no_grad():
                cached = self.dequantize(dtype)
                finish(cached.device)
            self._dequantized = cached
            self._dequantized_from = source
        return cached

    def _source(self) -> tuple[Any, ...]:
        """Changes when a packed tensor is replaced, moved or written."""
        return tuple(
            (tensor.data_ptr(), tensor.device, 0 if tensor.is_inference() else tensor._version)
            for name, tensor in self._parameters.items()
            if tensor is not None and name != "bias"
        )

    def _drop_dequantized(self) -> None:
        self.__dict__["_dequantized"] = self.__dict__["_dequantized_from"] = None
        if "_looked" in self.__dict__:
            self.forget()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ARBLinear:
        self._drop_dequantized()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_dequantized()
        super()._load_from_state_dict(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._drop_dequantized()
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_dequantized": None, "_dequantized_from": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={self.layout_name}, block_size={self.block_size}, bits_per_weight={self.bits_per_weight():.3f}, "
            f"backend={self.backend}"
        )
