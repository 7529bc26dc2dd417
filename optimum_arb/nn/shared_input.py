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

if TYPE_CHECKING:
    from .linear import ARBLinear

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

    def __init__(self, layers: list[ARBLinear]):
        self.layers = layers
        self.enabled = True
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def output(self, layer: ARBLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's result for x `[..., K]`; None where the layer has to compute it itself."""
        index = layer.shared_index
        if self._input is not None and self._input is not x:
            self._input, self._outputs = None, []
            self.enabled = False  # cross-attention: key and value have an input of their own
            return None
        if self._input is None:
            self._input = x
            self._outputs = list(self._compute(x))
        out, self._outputs[index] = self._outputs[index], None
        if all(left is None for left in self._outputs):
            self._input, self._outputs = None, []
        return out

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.layers[0]
        tensors: list[list[torch.Tensor]] = []
        for name in packing.TENSOR_NAMES:
            found = [layer.packed_parameter(name) for layer in self.layers]
            tensors.append([tensor for tensor in found if tensor is not None])
        biases = [layer.bias for layer in self.layers]
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        out = torch.ops.optimum_arb.shared_input_linear(
            x, *tensors, bias, first.layout.name, first.block_size, first.backend
        )
        return out.split([layer.out_features for layer in self.layers], -1)

    def prepare(self) -> bool:
        """Makes the copy of the weights that the kernel reads; returns whether it will be used."""
        from ..ops.backends.triton.dispatch import prepare

        weights = [packed_weight(layer) for layer in self.layers]
        self.enabled = self.enabled and prepare(weights)
        return self.enabled


def packed_weight(layer: ARBLinear) -> PackedWeight:
    """The layer's tensors as a backend takes them."""
    tensors = {name: layer.packed_parameter(name) for name in packing.TENSOR_NAMES}
    return PackedWeight(layer.layout, layer.block_size, layer.in_features, **tensors)  # type: ignore[arg-type]


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
            found: list[ARBLinear] = layers  # type: ignore[assignment]
            kinds = {
                (
                    layer.layout.name,
                    layer.block_size,
                    layer.in_features,
                    layer.backend,
                    layer.bias is None,
                    layer.packed_parameter("permutation") is None,
                )
                for layer in found
            }
            if len(kinds) == 1:
                shared = SharedInput(found)
                for index, layer in enumerate(found):
                    layer.shared_input, layer.shared_index = shared, index
                groups += 1
    return groups


def prepare_layer(layer: ARBLinear) -> None:
    """Makes what the kernels for few tokens need, once the layer's tensors are on a GPU that has them."""
    from ..ops.backends.triton.dispatch import prepare

    if not has_one_bit_kernel(layer.weight.device):
        return
    shared = layer.shared_input
    if shared is None or not shared.enabled or not shared.prepare():
        prepare([packed_weight(layer)])
