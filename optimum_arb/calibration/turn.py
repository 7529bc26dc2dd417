"""`LayerTurn`: a layer that was binarized and has not yet computed the inputs of the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .activations import Activations
from .calls import Call
from .experts import LayerStatistics


@dataclass
class LayerTurn:
    """A layer of a chain that was binarized and has not yet computed the inputs of the next.

    Attributes:
        name: of the layer.
        layer: the layer with its binarized modules, on `device`; it may be changed.
        targets: names in the model of what was binarized in it.
        device: where it runs.
        inputs: its hidden states in, batch by batch, on the CPU.
        references: hidden states out, on the CPU: what the float layer made of `inputs` or, where the walk follows the
            float model, of the float model's hidden states.
        calls: its other arguments, batch by batch.
        modules: name -> the float module that was binarized; with error correction, of the weight that was fitted.
        statistics: their calibration matrices.
        fitted: how many batches something may be fitted to; the others follow them.
    """

    name: str
    layer: nn.Module
    targets: list[str]
    device: torch.device
    inputs: Activations
    references: list[torch.Tensor]
    calls: list[Call]
    modules: dict[str, nn.Module]
    statistics: LayerStatistics
    fitted: int

    def run(self, batch: int) -> torch.Tensor:
        """The layer's output `[B, L, H]` for a batch as it is now, on `device`; with a gradient where that is on."""
        return self.calls[batch].run(self.layer, self.inputs[batch].to(self.device, copy=True), self.device)


AfterLayer = Callable[[LayerTurn], None]
