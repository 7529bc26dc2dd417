"""`PackedParameters`: a packed product whose tensors are the parameters of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..format import packing, scales
from ..format.layout import Layout
from ..ops.streams import finish
from .casting import keep_dtype
from .compiled import DECODED, Facts, Group, group_keys
from .plans import getter
from .prepared_layers import MAX_TOKENS, is_offloaded
from .product import PackedProduct

# Parameters by the names of their packed tensors.
PARAMETERS = {name: name if name == "weight" else f"weight_{name}" for name in packing.STORED_NAMES}
_OPERANDS = tuple(PARAMETERS[name] for name in packing.TENSOR_NAMES)
_BYTES = ("weight", "salient_weight", "inner", "input_signs")
_INDICES = ("permutation", "salient_columns")
# of parameters, and of buffers where there are some
_Readers = tuple[Callable[[Any], tuple[torch.Tensor, ...]], Callable[[Any], tuple[torch.Tensor, ...]] | None]


class PackedParameters(PackedProduct, nn.Module):
    """The packed tensors of a layer: made, filled, read, moved and copied.

    What is stored in another form than the operators take, scales as codes and the signs of the inputs as bits, has a
    buffer beside its parameter, `decoded_row_scale` and so on, which state dicts and files do not have.

    Attributes:
        in_features: K of the layer.
    """

    in_features: int

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
        self._code_keys: tuple[str, ...] = ()  # the parameters that are looked at for a change of what was decoded
        self._readers: _Readers | None = None  # of the tensors that there are
        self._read_nothing()
        self._decoded_from: tuple[Any, ...] | None = None
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

    def packed_parameter(self, name: str) -> torch.Tensor | None:
        """The parameter of the stored tensor of this name of `optimum_arb.format.packing.pack`, or None."""
        return self._parameters.get(PARAMETERS[name])

    def taken(self, name: str) -> torch.Tensor | None:
        """The stored tensor of this name, or what it was decoded to."""
        return self._buffers[f"{DECODED}{name}"] if name in self._coded else self._parameters.get(PARAMETERS[name])

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
            coded = [f"{DECODED}{name}" for name in packing.TENSOR_NAMES if name in self._coded]
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

    # What compiled code reads, see `compiled.py`

    def _read_nothing(self) -> None:
        self._facts: Facts | None = None  # of the product that the input enters
        self._following: Facts | None = None  # of one that its result enters
        self.compute_alone()

    def compute_alone(self) -> None:
        """Compiled code computes this layer by itself."""
        self._group: Group | None = None
        self._place: tuple[int, int] | None = None  # in it, and of how many

    def compute_together(self, group: Group, index: int, count: int) -> None:
        """Compiled code computes this layer with others of the same input, which find it in the group."""
        place = (index, count)
        if self._group is not group or self._place != place:  # else the dict that torch looks at stays unchanged
            self._group, self._place = group, place
        for key, value in zip(group_keys(index), (self._facts, self._parameters, self._buffers), strict=True):
            if group.get(key) is not value:
                group[key] = value

    @property
    def module(self) -> PackedParameters:
        return self

    def describe(self) -> None:
        """Makes the facts as they are now, for this layer and those of its group."""
        facts, following = self._described()
        if (facts, following) != (self._facts, self._following):  # else the dicts that torch looks at stay unchanged
            self._facts, self._following = facts, following
        if self._group is not None and self._place is not None:
            self.compute_together(self._group, *self._place)

    def _described(self) -> tuple[Facts, Facts | None]:
        """The facts of the product that the input enters, and of one that its result enters."""
        names = {name: name for name in packing.TENSOR_NAMES if not (self.hadamard and name == "permutation")}
        return self._facts_of(self, names, "bias"), None

    def _facts_of(self, product: PackedProduct, names: Mapping[str, str], bias: str | None) -> Facts:
        """The facts of a product whose tensors are stored by these names."""
        stored = [names.get(name) for name in packing.TENSOR_NAMES]
        keys = [*(name if name is None else self._key(name) for name in stored), bias]
        return (
            product.layout.name,
            product.block_size,
            product.columns,
            product.out_features,
            product.hadamard,
            product._most_tokens,
            tuple(key if self._has(key) else None for key in keys),
            bool(self._coded),
        )

    def _has(self, key: str | None) -> bool:
        return key in self._parameters or key in self._buffers

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if self._facts is not None:
            self.describe()

    def _key(self, name: str) -> str:
        return f"{DECODED}{name}" if name in self._coded else PARAMETERS[name]

    def _watched(self) -> list[tuple[dict[str, Any], str]]:
        return [(values, key) for values in (self._parameters, self._buffers) for key in values]

    def _bias_now(self) -> torch.Tensor | None:
        try:
            return self._parameters["bias"]  # a module finds its parameters by way of an error
        except KeyError:
            return self.bias

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

        To be called where these were changed by other means than a module's own methods and the layer runs compiled, or
        were written into by way of `.data`, which counts no version of the tensor; a call that is not compiled notices
        everything else by itself.
        """
        grids = self._grids
        stored = {name: self._parameters.get(PARAMETERS[name]) for name in (*grids, "scale_grid", "input_signs")}
        tensors = {name: parameter.data for name, parameter in stored.items() if parameter is not None}
        coded = [name for name in grids if "scale_grid" in tensors and tensors[name].dtype == torch.uint8]
        if "input_signs" in tensors:
            coded.append("input_signs")
        for name in set(self._coded) - set(coded):
            delattr(self, f"{DECODED}{name}")
        self._coded = tuple(coded)
        # and the order of columns of a transform, which layers of one input have in common
        order = ("permutation",) if "input_signs" in coded else ()
        self._code_keys = tuple(PARAMETERS[name] for name in (*coded, "scale_grid", *order)) if coded else ()
        self._readers = None
        if coded:
            # tensors of inference mode could not be kept for a gradient later
            with torch.inference_mode(False), torch.no_grad():
                values = scales.decoded(tensors, grids)
                if "input_signs" in tensors:
                    signs = packing.unpack_bits(tensors["input_signs"], 1, self.in_features)[0, 0]
                    values["input_signs"] = signs.to(torch.int8) * 2 - 1
            for name in coded:
                self.register_buffer(f"{DECODED}{name}", values[name], persistent=False)
            finish(values[coded[0]].device)
        self._decoded_from = self._codes()
        self.describe()

    def _codes(self) -> tuple[Any, ...]:
        """Changes when a tensor of codes, a grid or the order of a transform is replaced, moved or written."""
        tensors = [self._parameters.get(key) for key in self._code_keys]
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None)

    def packed(self) -> dict[str, torch.Tensor]:
        """The packed tensors by the names of `optimum_arb.format.packing.pack`."""
        found = {name: self._parameters.get(key) for name, key in PARAMETERS.items()}
        return {name: parameter.data for name, parameter in found.items() if parameter is not None}

    @property
    def is_offloaded(self) -> bool:
        return "_hf_hook" in self.__dict__ and is_offloaded(self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedParameters:
        """Moves everything; `.to(dtype)` and its kin cast the bias alone, as loading in another dtype does."""
        packed = [tensor for name, tensor in self._parameters.items() if name != "bias"]
        super()._apply(keep_dtype(fn, [*packed, *self._buffers.values()]), recurse)
        self.decode_stored()  # of codes at other addresses
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.decode_stored()

    def __getstate__(self) -> dict[str, Any]:
        left_behind = dict.fromkeys(("shared_input", "_prepared", "_sources", "_plans", "_readers"))
        left_behind |= dict.fromkeys(("_facts", "_following", "_group", "_place"))  # what compiled code reads
        left_behind |= {"_looked": False, "_most_tokens": MAX_TOKENS}
        return {**self.__dict__, **left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._read_nothing()
        self.decode_stored()
