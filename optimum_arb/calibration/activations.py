"""The hidden states between two layers, for all batches of the calibration."""

from __future__ import annotations

import torch

# In place of a layer's name, for what enters the first one.
INPUTS = ""


class Activations:
    """The hidden states of all batches, on the CPU, in memory.

    A layer reads the batches of one generation and writes those of the next; `advance` makes the next the current one.
    Here a batch may be read no more once the next generation's has been written in its place.
    """

    def __init__(self) -> None:
        self._batches: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._batches[batch]

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Writes a batch of the next generation; batches come in their order."""
        kept = hidden.detach().to("cpu")
        if batch == len(self._batches):
            self._batches.append(kept)
        else:
            self._batches[batch] = kept

    def advance(self, layer: str) -> None:
        """What was put becomes what is read: the outputs of this layer, or what enters the first one (`INPUTS`)."""

    def restore(self, layer: str) -> bool:
        """Whether the outputs of this layer, which an interrupted run computed, are at hand; they are current then."""
        return False

    def clear(self) -> None:
        """Lets go of all batches."""
        self._batches.clear()
