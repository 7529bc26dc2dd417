"""Layers that are given the same input, query, key and value say, computed in one launch when there are few tokens.

Modules, parameters and files stay as they are: the first of the layers that is called computes for all, and the others
take their part when they are called with the same tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import packing
from ..ops.backends.packed import PackedWeight
from ..ops.backends.triton.available import has_one_bit_kernel
from ..ops.shared_input import split_results

if TYPE_CHECKING:
    from ..ops.backends.triton.prepack import Prepacked
    from .input_transform import InputTransform
    from .product import PackedProduct

# Children of one module that its forward calls with one and the same tensor, in the order in which they are computed.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
MAX_TOKENS = 4  # of the kernel that computes several weights at once


class SharedInput:
    """The layers of one input.

    Attributes:
        layers: at most three, of one layout, block size and number of input features.
        enabled: False once one of them was called with another input than the first.
    """

    def __init__(self, layers: list[PackedProduct]):
        self.layers = layers
        self.enabled = True
        self._rows = [layer.out_features for layer in layers]
        self._prepared: Prepacked | None = None
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []
        self._source: torch.Tensor | None = None  # the input that was transformed last, and what it became
        self._transformed: torch.Tensor | None = None
        self._uses = 0
        self._alike = True  # as `share_inputs` found them

    def output(self, layer: PackedProduct, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's result for x `[..., K]`; None where the layer has to compute it itself."""
        if self._input is not None and self._input is not x:
            self.enabled = False  # cross-attention: key and value have an input of their own
            self.forget()
            for each in self.layers:
                each._looked = False  # for a copy of its own weight alone: the next call that is not compiled
            return None
        if self._input is None:
            self._input = x
            self._outputs = [*split_results(self._compute(x), x.shape[:-1], self._rows)]
        index = layer.shared_index
        out, self._outputs[index] = self._outputs[index], None
        if all(left is None for left in self._outputs):
            self._input, self._outputs = None, []
        return out

    def transformed(self, x: torch.Tensor, change: InputTransform) -> torch.Tensor:
        """What becomes of an input, computed once for all layers that are called with it one after another."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._still_alike():
            return change(x)  # what is kept must not outlive its graph
        if self._source is not x or self._transformed is None:
            self._source, self._transformed, self._uses = x, change(x), 0
        result = self._transformed
        self._uses += 1
        if self._uses == len(self.layers):
            self._source = self._transformed = None
        return result

    def _still_alike(self) -> bool:
        """Whether the layers still do the same to their input; where they do not, none is computed for another."""
        if not self._alike:
            self._alike = _one_transform(self.layers)
            self.enabled = self.enabled and self._alike
        return self._alike

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        """The layers' results one after another, a vector."""
        first = self.layers[0]
        biases: list[torch.Tensor] = [layer.bias for layer in self.layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        change = first.input_transform()
        if change is not None:
            x = change(x)
        if self._prepared is not None and not torch.compiler.is_compiling():
            from ..ops.backends.triton.dispatch import run_prepared

            return run_prepared(x.reshape(-1, x.shape[-1]), self._prepared, bias, tuple(self._rows))
        tensors: list[list[torch.Tensor]] = []
        for name in packing.TENSOR_NAMES:
            found = [layer.operand(name) for layer in self.layers]
            tensors.append([tensor for tensor in found if tensor is not None])
        return torch.ops.optimum_arb.shared_input_linear(
            x, *tensors, bias, first.layout.name, first.block_size, first.backend
        )

    def prepare(self) -> bool:
        """Makes the copy of the weights that the kernel reads; returns whether it will be used."""
        from ..ops.backends.triton import prepack
        from ..ops.backends.triton.dispatch import prepare

        weights = [packed_weight(layer) for layer in self.layers]
        if not self._still_alike() or not self.enabled:
            prepack.drop(weights)
        elif any(layer.is_offloaded for layer in self.layers) or len({w.weight.device for w in weights}) > 1:
            self.enabled = False
        else:
            self._prepared = prepare(weights)
            self.enabled = self._prepared is not None
        return self.enabled

    def forget(self) -> None:
        """Drops what was computed and prepared: a layer's tensors have changed."""
        self._prepared = self._input = self._source = self._transformed = None
        self._outputs = []
        self._alike = False  # has to be looked at again


def packed_weight(layer: PackedProduct) -> PackedWeight:
    """The layer's tensors as a backend takes them."""
    tensors = {name: layer.operand(name) for name in packing.TENSOR_NAMES}
    return PackedWeight(layer.layout, layer.block_size, layer.columns, **tensors)  # type: ignore[arg-type]


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a hook of accelerate brings the layer's weights to the GPU for the time of a call: no copy is to stay."""
    hook = getattr(layer, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def share_inputs(model: nn.Module) -> int:
    """Finds the layers that share an input by their names and types, so that they are computed together.

    Args:
        model: whose packed layers are in place.

    Returns:
        The number of groups.
    """
    from .linear import ARBLinear

    groups = 0
    for parent in model.modules():
        for names in SHARED_INPUTS:
            layers = [parent._modules.get(name) for name in names]
            if not all(isinstance(layer, ARBLinear) for layer in layers):
                continue
            found: list[PackedProduct] = [layer.first_product for layer in layers]  # type: ignore[union-attr, misc]
            kinds = {
                (
                    layer.layout.name,
                    layer.block_size,
                    layer.columns,
                    layer.backend,
                    layer.bias is None,
                    layer.operand("permutation") is None,
                )
                for layer in found
            }
            if len(kinds) == 1 and _one_transform(found):
                shared = SharedInput(found)
                for index, layer in enumerate(found):
                    layer.shared_input, layer.shared_index = shared, index
                groups += 1
    return groups


def _one_transform(layers: list[PackedProduct]) -> bool:
    """Whether all do the same to their input before they multiply it."""
    first, *others = [layer.input_transform() for layer in layers]
    return all(other is None if first is None else first.equals(other) for other in others)


def prepare_layer(layer: PackedProduct) -> Prepacked | None:
    """Makes what the kernel for few tokens needs, once the layer's tensors are on a GPU that has it.

    Returns:
        The layer's own copy of its weight; None where it shares one with others or has none.
    """
    weight = packed_weight(layer)
    if layer.is_offloaded or not has_one_bit_kernel(weight.weight.device):
        return None
    from ..ops.backends.triton.dispatch import prepare

    shared = layer.shared_input
    if shared is not None and shared.prepare():
        return None
    return prepare([weight])


def run_prepared_layer(x: torch.Tensor, prepared: Prepacked, bias: torch.Tensor | None) -> torch.Tensor:
    """A layer's result for few tokens, without the operator's detour: `[..., K]` to `[..., N]`."""
    from ..ops.backends.triton.dispatch import run_prepared

    out = run_prepared(x.reshape(-1, x.shape[-1]), prepared, bias, (prepared.rows,))
    return out.view(*x.shape[:-1], prepared.rows)
