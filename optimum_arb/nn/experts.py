"""`ARBExperts`: the experts of a mixture, their matrices stored and run packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

from ..experts.matrices import expert_matrices, first_matrix
from ..experts.packing import PackedForm, expert_dequantized, expert_part
from ..experts.routing import Routed, route, weighted_sum
from ..format import packing
from ..format.packing import BinarizedWeight
from ..ops import grouped_linear
from ..ops.autocast import autocast_input
from ..ops.streams import finish
from .casting import keep_dtype

# What every module has of its own, and what others put on an instance: no part of the experts' description.
_NOT_COPIED = {*nn.Module().__dict__, "forward", "_hf_hook", "_old_forward"}


def _parameter_name(matrix: str, tensor: str) -> str:
    return matrix if tensor == "weight" else f"{matrix}_{tensor}"


def _is_trained(parameter: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    return parameter is not None and parameter.requires_grad


class ARBExperts(nn.Module):
    """The experts of one layer with binarized matrices, in place of a module that `@use_experts_implementation` marks.

    Attributes, children (the activation), biases and the formula of the gate are those of the float module. A matrix
    begins in float; `set_packed` replaces it by packed tensors, parameters without gradients of three dimensions:
    `gate_up_proj` (uint8) and, where the layout has them, `gate_up_proj_row_scale` and so on by the names of
    `optimum_arb.format.packing.TENSOR_NAMES`, as `optimum_arb.experts.packing.stack_experts` makes them.

    Args:
        module: the float experts; it is not changed, its parameters are shared until they are replaced.
        backend: as for `ARBLinear`; "dequantize" keeps a dequantized copy of the experts and runs it as transformers
            would. It may be set later too.
    """

    # of the float module
    num_experts: int
    has_gate: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, module: nn.Module, backend: str = "auto"):
        super().__init__()
        for key, value in module.__dict__.items():
            if key not in _NOT_COPIED:
                self.__dict__[key] = value
        self.training = module.training
        self._modules.update(module._modules)
        self._buffers.update(module._buffers)
        self._parameters.update(module._parameters)
        self.float_class: Any = type(module)
        self.float_matrices = expert_matrices(module)
        self.forms: dict[str, PackedForm] = {}
        self.backend = backend
        self._dequantized: nn.Module | None = None
        self._dequantized_from: tuple[Any, ...] | None = None
        # transformers leaves alone what has this mark when it initializes the weights of a model
        self._is_hf_initialized = True

    # Matrices

    def set_packed(self, name: str, form: PackedForm, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replaces a matrix by its packed form.

        Args:
            name: "gate_up_proj", "up_proj" or "down_proj".
            form: what the tensors mean.
            tensors: by the names of `optimum_arb.format.packing.TENSOR_NAMES`.
        """
        for key in packing.TENSOR_NAMES:
            self._parameters.pop(_parameter_name(name, key), None)
        for key, tensor in tensors.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            if not tensor.is_meta:
                setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (not a declared attribute)
            self.register_parameter(_parameter_name(name, key), parameter)
        forms = {**self.forms, name: form}
        self.forms = {key: forms[key] for key in self.float_matrices if key in forms}  # in the order of running

    def set_empty(
        self, name: str, form: PackedForm, permuted: bool, salient: int, dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Replaces a matrix by packed tensors on the meta device, for a checkpoint that holds them.

        Args:
            name: of the matrix.
            form: what the tensors will mean.
            permuted: whether the columns are permuted.
            salient: the number of salient columns.
            dtypes: of the tensors by name.
        """
        shapes = form.shapes(permuted, salient)
        self.set_packed(
            name, form, {key: torch.empty(shape, dtype=dtypes[key], device="meta") for key, shape in shapes.items()}
        )

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        """The packed tensors of a matrix by the names of `optimum_arb.format.packing.TENSOR_NAMES`."""
        found = {key: self._parameters.get(_parameter_name(name, key)) for key in packing.TENSOR_NAMES}
        return {key: parameter.data for key, parameter in found.items() if parameter is not None}

    def packed_names(self, *matrices: str) -> list[str]:
        """The names of the parameters that are packed, of some matrices or of all."""
        return [_parameter_name(name, key) for name in matrices or self.forms for key in self.packed(name)]

    def binarized(self, name: str, expert: int, part: int = 0) -> BinarizedWeight:
        """One part of the matrix of one expert, unpacked."""
        form = self.forms[name]
        tensors = expert_part(self.packed(name), form, expert, part)
        return packing.unpack(tensors, form.layout, form.in_features, form.block_size)

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A matrix in `dtype`, in the form that the float module has: `[E, N, K]`, or `[E, K, N]` if transposed."""
        form, tensors = self.forms[name], self.packed(name)
        weights = torch.stack([expert_dequantized(tensors, form, expert, dtype) for expert in range(form.experts)])
        return weights.transpose(1, 2).contiguous() if self.float_matrices[name].transposed else weights

    def bits_per_weight(self, name: str) -> float:
        """All stored bits of a matrix, of all experts, over its number of weights."""
        return packing.stored_bytes(self.packed(name)) * 8 / self.float_matrices[name].weights

    # Running

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: `[T, H]`, floating.
            top_k_index: int64 `[T, k]`, the experts of each token; numbers of E and above stand for none.
            top_k_weights: `[T, k]`.

        Returns:
            `[T, H]` of the dtype of `hidden_states`.
        """
        if self.backend == "dequantize":
            module = self._cached_module(hidden_states.dtype)
            inputs = (hidden_states, top_k_index, top_k_weights)
            trained = {}  # what is not packed: the copies in the module have no gradient
            if torch.is_grad_enabled():
                trained = {key: p.to(hidden_states.dtype) for key, p in self._parameters.items() if _is_trained(p)}
            return torch.func.functional_call(module, trained, inputs) if trained else module(*inputs)
        routed = route(top_k_index, self.num_experts)
        out = self._project(first_matrix(self), hidden_states[routed.rows], routed)
        out = self.float_class._apply_gate(self, out) if self.has_gate else self.act_fn(out)
        out = self._project("down_proj", out, routed)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        return weighted_sum(out, routed, top_k_weights).to(hidden_states.dtype)

    def _project(self, name: str, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """Rows of x, sorted by expert, times the matrices of their experts, plus their biases."""
        form = self.forms.get(name)
        if form is None:
            from transformers.integrations.moe import _grouped_linear

            weights = self.get_parameter(name)
            out = _grouped_linear(x, weights, routed.offsets.to(torch.int32), is_transposed=self.is_transposed)
            out = out.masked_fill(routed.none, 0.0).to(x.dtype)  # it leaves the rows of no expert uninitialized
        else:
            tensors: dict[str, Any] = {
                key: self._parameters.get(_parameter_name(name, key)) for key in packing.TENSOR_NAMES
            }
            out = grouped_linear(
                autocast_input(x),
                routed.offsets,
                **tensors,
                layout=form.layout.name,
                block_size=form.block_size,
                parts=form.parts,
                backend=self.backend,
            ).to(x.dtype)
        bias = self._parameters.get(f"{name}_bias")
        return out if bias is None else out + bias[routed.owner].to(out.dtype)

    # The float module, for `dequantize()` and for backend="dequantize"

    @torch.no_grad()
    def float_module(self, dtype: torch.dtype) -> nn.Module:
        """The float module with the dequantized matrices, everything in `dtype`."""
        plain = self.float_class.__new__(self.float_class)
        nn.Module.__init__(plain)
        own = {"float_class", "float_matrices", "forms", "backend", "_dequantized", "_dequantized_from"}
        for key, value in self.__dict__.items():
            if key not in _NOT_COPIED | own | {"_is_hf_initialized"}:
                plain.__dict__[key] = value
        plain._modules.update(self._modules)
        plain._buffers.update(self._buffers)
        packed = self.packed_names()
        for key, parameter in self._parameters.items():
            if key in self.forms:
                plain.register_parameter(key, nn.Parameter(self.dequantize(key, dtype)))
            elif key not in packed:
                value = None if parameter is None else nn.Parameter(parameter.detach().to(dtype))
                plain.register_parameter(key, value)
        return plain.train(self.training)

    def _cached_module(self, dtype: torch.dtype) -> nn.Module:
        # while compiling, addresses and versions cannot be looked at: the hooks below drop what has become stale
        tracing = torch.compiler.is_compiling()
        source = (dtype, None if tracing else self._source())
        stale = self._dequantized_from is None or self._dequantized_from[0] != dtype
        if stale or not (tracing or source == self._dequantized_from):
            # tensors of inference mode could not be used for a gradient later
            with torch.inference_mode(False):
                module = self.float_module(dtype)
                for parameter in module.parameters(recurse=False):  # its children are this module's own
                    parameter.requires_grad_(False)
            finish(next(module.parameters()).device)
            # not as an attribute, which would make it a child with parameters of this module
            self.__dict__["_dequantized"], self.__dict__["_dequantized_from"] = module, source
        module = self.__dict__["_dequantized"]
        module.train(self.training)
        return module

    def _source(self) -> tuple[Any, ...]:
        """Changes when a parameter is replaced, moved or written."""
        return tuple(
            (tensor.data_ptr(), tensor.device, 0 if tensor.is_inference() else tensor._version)
            for tensor in self._parameters.values()
            if tensor is not None
        )

    def _drop_dequantized(self) -> None:
        self.__dict__["_dequantized"] = self.__dict__["_dequantized_from"] = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ARBExperts:
        """Moves everything; `.to(dtype)` and its kin cast what is not packed."""
        self._drop_dequantized()
        packed = [self._parameters[name] for name in self.packed_names(*self.forms)]
        return super()._apply(keep_dtype(fn, packed), recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_dequantized()
        super()._load_from_state_dict(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._drop_dequantized()
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dequantized": None, "_dequantized_from": None}

    def extra_repr(self) -> str:
        parts = [f"{self.float_class.__name__}, experts={self.num_experts}"]
        for name, matrix in self.float_matrices.items():
            form = self.forms.get(name)
            how = "float" if form is None else f"{form.layout.name}, bits_per_weight={self.bits_per_weight(name):.3f}"
            parts.append(f"{name}=({matrix.out_features}, {matrix.in_features}, {how})")
        return ", ".join([*parts, f"backend={self.backend}"])
