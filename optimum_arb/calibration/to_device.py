"""Brings the layers of a walk to the device: each in its turn, or before it, beside what the device has to do."""

from __future__ import annotations

import torch
from torch import nn

from .activations import copying_stream
from .weights import LayerWeights


class ToDevice:
    """
    Args:
        weights: where the layers' weights are.
        device: where layers run.
    """

    def __init__(self, weights: LayerWeights, device: torch.device):
        self._weights = weights
        self._device = device
        self._there: str | None = None  # the layer that was brought last

    def bring(self, name: str, layer: nn.Module) -> None:
        """The layer of this name is about to run."""
        if self._there != name:
            self._weights.load(name)
            self._there = name
        layer.to(self._device)

    def bring_beside(self, name: str, layer: nn.Module) -> None:
        """It will run next: the host waits for its copy, and the copy for nothing that the device was asked for."""
        if self._there == name or self._device.type != "cuda":
            self.bring(name, layer)
            return
        here, stream = torch.cuda.current_stream(self._device), copying_stream(self._device)
        with torch.cuda.stream(stream):
            self.bring(name, layer)
        here.wait_stream(stream)
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.record_stream(here)
