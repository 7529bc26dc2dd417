"""`ARBLinear`: a linear layer whose weight is stored and run packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..format import packing, scales
from ..format.layout import Layout, form_name
from ..format.packing import BinarizedWeight
from .casting import keep_dtype
from .input_transform import InputTransform
from .plans import getter
from .prepared_layers import is_offloaded
from .product import PackedProduct

# Parameters by the names of their packed tensors.
PARAMETERS = {name: name if name == "weight" else f"weight_{name}" for name in packing.STORED_NAMES}
_OPERANDS = tuple(PARAMETERS[name] for name in packing.TENSOR_NAMES)
_BYTES = ("weight", "salient_weight", "inner", "input_signs")
_INDICES = ("permutation", "salient_columns")
# of parameters, and of buffers where there are some
_Readers = tuple[Callable[[Any], tuple[torch.Tensor, ...]], Callable[[Any], tuple[torch.Tensor, ...]] | None]


class ARBLinear(PackedProduct, nn.Linear):  # type: ignore[misc]  # `bias` is declared in both
    """`y = x W^T + bias` with a binarized weight.

    The packed tensors are parameters without gradients, all of two dimensions: `weight` (uint8) and, where the layout
    has them, `weight_row_scale`, `weight_col_scale`, `weight_permutation`, `weight_salient_columns`,
    `weight_salient_weight` and `weight_salient_col_scale`, the tensors of `optimum_arb.format.packing.pack`. A new
    layer's are empty: `from_binarized` or `load_state_dict` fill them. `nn.Linear` is the base class for `isinstance`
    alone.

    Scales of 8 bits are parameters of codes, with their `weight_scale_grid`; the float16 scales that the operator takes
    are buffers beside them, `decoded_row_scale` and so on, which state dicts and files do not have.

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
        """All but the parameters."""
        nn.Module.__init__(self)  # not nn.Linear's, which makes a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.block_size = block_size
        self.backend = backend
        self.hadamard = 0
        self.shared_input = None
        self.shared_index = 0
        self._prepared = None
        self._looked = False
        self._coded: tuple[str, ...] = ()  # the scales that are stored as codes
        self._readers: _Readers | None = None  # of the tensors that there are
        self._decoded_from: tuple[Any, ...] | None = None
        self._dequantized: torch.Tensor | None = None
        self._dequantized_from: tuple[Any, ...] | None = None
        # transformers leaves alone what has this mark when it initializes the weights of a model's linears
        self._is_hf_initialized = True

    def _set_empty(
        self,
        shapes: Mapping[str, tuple[int, int]],
        scale_dtypes: Mapping[str, torch.dtype],
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Registers empty parameters of these shapes and, if asked, a bias of `dtype`."""
        index = torch.int16 if self.in_features <= 2**15 else torch.int32
        scale = torch.uint8 if "scale_grid" in shapes else torch.float16
        dtypes = {name: scale for name in shapes if name.endswith("scale")} | dict(scale_dtypes)
        dtypes |= dict.fromkeys(_BYTES, torch.uint8) | dict.fromkeys(_INDICES, index) | {"scale_grid": torch.float32}
        for name in packing.STORED_NAMES:
            if name in shapes:
                self._set_packed(name, torch.empty(shapes[name], dtype=dtypes[name], device=device))
        self.decode_stored()
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        )

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

    def _fill(self, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, device: torch.device) -> None:
        """Puts packed tensors, and a copy of the bias on their device, in the place of empty ones."""
        for name, tensor in tensors.items():
            self._set_packed(name, tensor)
            # for models whose `_init_weights` fills the weights of children; not on empty tensors, which would hide
            # from transformers that a checkpoint lacks them
            setattr(getattr(self, PARAMETERS[name]), "_is_hf_initialized", True)  # noqa: B010 (not a declared attribute)
        self.decode_stored()
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device, copy=True), bias.requires_grad)

    def _set_packed(self, name: str, tensor: torch.Tensor) -> None:
        self.register_parameter(PARAMETERS[name], nn.Parameter(tensor, requires_grad=False))

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

    def packed_parameter(self, name: str) -> torch.Tensor | None:
        """The parameter of the stored tensor of this name of `optimum_arb.format.packing.pack`, or None."""
        return self._parameters.get(PARAMETERS[name])

    def taken(self, name: str) -> torch.Tensor | None:
        """The stored tensor of this name, or what it was decoded to."""
        return self._buffers[f"decoded_{name}"] if name in self._coded else self._parameters.get(PARAMETERS[name])

    def operand(self, name: str) -> torch.Tensor | None:
        return None if name == "permutation" and self.hadamard else self.taken(name)

    def _operands(self) -> list[torch.Tensor | None]:
        if self._coded:
            return super()._operands()
        get = self._parameters.get
        return [get(key) for key in _OPERANDS]

    def _present(self) -> tuple[torch.Tensor, ...]:
        readers = self._readers
        if readers is None:
            coded = [f"decoded_{name}" for name in packing.TENSOR_NAMES if name in self._coded]
            rest = [name for name in packing.TENSOR_NAMES if name not in self._coded]
            there = [PARAMETERS[name] for name in rest if self.operand(name) is not None]
            if self._parameters.get("bias") is not None:
                there.append("bias")
            readers = self._readers = getter(there), getter(coded) if coded else None
        parameters, buffers = readers
        try:
            found = parameters(self._parameters)
            return found if buffers is None else found + buffers(self._buffers)
        except KeyError:  # one was taken away by other means than a module's own
            return super()._present()

    def _watched(self) -> list[tuple[dict[str, Any], str]]:
        return [(values, key) for values in (self._parameters, self._buffers) for key in values]

    def _bias_now(self) -> torch.Tensor | None:
        try:
            return self._parameters["bias"]  # a module finds its parameters by way of an error
        except KeyError:
            return self.bias

    def input_transform(self) -> InputTransform | None:
        if not self.hadamard:
            return None
        sign = self._buffers["decoded_input_signs"]
        assert sign is not None
        return InputTransform(self.packed_parameter("permutation"), sign, self.hadamard, self.backend)

    # What is stored in another form than the operators take

    @property
    def scale_bits(self) -> int:
        """16, or 8 where scales are stored as codes."""
        return 16 if self._parameters.get(PARAMETERS["scale_grid"]) is None else 8

    @property
    def _grids(self) -> dict[str, int]:
        """The tensors of scales -> how many grids each has in 8 bits."""
        return scales.scale_grids(self.layout)

    def forget(self) -> None:
        super().forget()
        self._readers = None

    def decode_stored(self) -> None:
        """Makes the float16 scales of stored codes and the signs of the inputs anew.

        To be called where these were changed by other means than a module's own methods and the layer runs compiled; a
        call that is not compiled notices by itself.
        """
        grids = self._grids
        stored = {name: self._parameters.get(PARAMETERS[name]) for name in (*grids, "scale_grid", "input_signs")}
        tensors = {name: parameter.data for name, parameter in stored.items() if parameter is not None}
        coded = [name for name in grids if "scale_grid" in tensors and tensors[name].dtype == torch.uint8]
        if "input_signs" in tensors:
            coded.append("input_signs")
        for name in set(self._coded) - set(coded):
            delattr(self, f"decoded_{name}")
        self._coded = tuple(coded)
        self._readers = None
        if coded:
            # tensors of inference mode could not be kept for a gradient later
            with torch.inference_mode(False), torch.no_grad():
                values = scales.decoded(tensors, grids)
                if "input_signs" in tensors:
                    signs = packing.unpack_bits(tensors["input_signs"], 1, self.in_features)[0, 0]
                    values["input_signs"] = signs.to(torch.int8) * 2 - 1
            for name in coded:
                self.register_buffer(f"decoded_{name}", values[name], persistent=False)
        self._decoded_from = self._codes()

    def _codes(self) -> tuple[Any, ...]:
        """Changes when a tensor of codes or a grid is replaced, moved or written."""
        keys = [PARAMETERS[name] for name in (*self._coded, "scale_grid")] if self._coded else []
        tensors = [self._parameters.get(key) for key in keys]
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None)

    @property
    def is_offloaded(self) -> bool:
        return "_hf_hook" in self.__dict__ and is_offloaded(self)

    def packed(self) -> dict[str, torch.Tensor]:
        """The packed tensors by the names of `optimum_arb.format.packing.pack`."""
        found = {name: self._parameters.get(key) for name, key in PARAMETERS.items()}
        return {name: parameter.data for name, parameter in found.items() if parameter is not None}

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
        """`[..., in_features]`, of any floating dtype, to `[..., out_features]` of that dtype."""
        if self.backend == "dequantize":
            weight = self._cached_weight(x.dtype)
            return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        if self._coded and not torch.compiler.is_compiling() and self._codes() != self._decoded_from:
            self.forget()
            self.decode_stored()
        return self._product(x)

    # The dequantized copy of backend="dequantize". It is no parameter and no buffer: state dicts do not have it.

    def _cached_weight(self, dtype: torch.dtype) -> torch.Tensor:
        # while compiling, addresses and versions cannot be looked at: the hooks below drop what has become stale
        tracing = torch.compiler.is_compiling()
        cached = self._dequantized
        source = None if tracing else self._source()
        if cached is None or cached.dtype != dtype or not (tracing or source == self._dequantized_from):
            with torch.no_grad():
                cached = self.dequantize(dtype)
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
        """Moves everything; `.to(dtype)` and its kin cast the bias alone, as loading in another dtype does."""
        self._drop_dequantized()
        packed = [tensor for name, tensor in self._parameters.items() if name != "bias"]
        super()._apply(keep_dtype(fn, [*packed, *self._buffers.values()]), recurse)
        self.decode_stored()  # of codes at other addresses
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_dequantized()
        super()._load_from_state_dict(*args, **kwargs)
        self.decode_stored()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._drop_dequantized()
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        left_behind = {
            "shared_input": None,
            "_prepared": None,
            "_looked": False,
            "_plans": None,
            "_readers": None,
            "_dequantized": None,
            "_dequantized_from": None,
        }
        return {**self.__dict__, **left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.decode_stored()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={self.layout_name}, block_size={self.block_size}, bits_per_weight={self.bits_per_weight():.3f}, "
            f"backend={self.backend}"
        )
