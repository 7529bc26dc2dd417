"""Prompts through the layers of one input, query, key and value say: all launches of all of them by one call.

The layers' results are the same bits as each layer's own: what is launched is the same. What is saved is the host's
time, of which an eager prompt of a few hundred tokens consists.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from ..ops.shared_input import GroupPlan, plan_group
from .plans import MAX_PLANS, Plans, current_device

if TYPE_CHECKING:
    from .product import PackedProduct

MAX_ALONE = 1024


class SharedPrompts:
    """What the layers of one input keep ready for prompts. It keeps no input and no result."""

    def __init__(self) -> None:
        self._plans: Plans[GroupPlan] | None = None
        self._alone: set[Hashable] = set()  # kinds of inputs of which each layer computes its own result

    def forget(self) -> None:
        """Drops what was made ready: a layer's tensors have changed."""
        self._plans = None
        self._alone.clear()

    def results(self, layers: list[PackedProduct], x: torch.Tensor) -> list[torch.Tensor] | None:
        """The layers' results for x `[..., K]`, on the current stream; None where each has to compute its own.

        Args:
            layers: of one layout, block size and number of input features, which do the same to their input first.
            x: on a CUDA device.
        """
        key = (x.numel(), x.dtype)
        if key in self._alone or type(x) is not torch.Tensor or not x.is_contiguous() or x.data_ptr() % 16:
            return None
        first = layers[0]
        if x.size(-1) != first.columns or current_device() != x.get_device():
            return None
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in [x, *_biases(layers)]):
            return None
        backend = first.backend
        tensors: list[torch.Tensor] = []
        for layer in layers:
            if layer.backend != backend:
                return None
            tensors += layer._present()
        change = first.input_transform()
        if change is not None:
            tensors += [tensor for tensor in change[:2] if tensor is not None]
        plans = self._plans
        if plans is None or plans.backend != backend or not plans.fit(tensors) or len(plans) > MAX_PLANS:
            self._plans = None
            if any(layer.is_offloaded for layer in layers):
                return None
            plans = self._plans = Plans(tensors, backend)
        found = plans.get(key)
        if found is None:
            if torch.cuda.is_current_stream_capturing():  # the host has to look at tensors once
                return None
            weights = [layer.packed_weight() for layer in layers]
            found = plan_group(x, weights, _biases(layers), None if change is None else change[:3], backend)
            if found is None:
                if len(self._alone) > MAX_ALONE:
                    self._alone.clear()
                self._alone.add(key)
                return None
            plans[key] = found
        results = found.run(x)
        plans.keep(found, x.shape, None, lambda: [place for layer in layers for place in layer._watched()])
        return results

    def call(self, x: torch.Tensor, backend: str) -> list[torch.Tensor] | None:
        """`results` by a call that was made ready, without gradients; None where there is none for such an input."""
        plans = self._plans
        if plans is None or plans.call is None or plans.backend != backend:
            return None
        return plans.call(x)


def _biases(layers: list[PackedProduct]) -> list[torch.Tensor | None]:
    return [layer._bias_now() for layer in layers]
