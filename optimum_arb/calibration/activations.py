"""The hidden states between two layers, for all batches of the calibration."""

from __future__ import annotations

import torch

# Bytes of page-locked memory that are taken at once: torch rounds each to a power of two.
SLAB = 1 << 26

# In place of a layer's name, for what enters the first one.
INPUTS = ""


class Activations:
    """The hidden states of all batches, on the CPU, in memory.

    A layer reads the batches of one generation and writes those of the next; `advance` makes the next the current one.
    Here a batch may be read no more once the next generation's has been written in its place.

    Those of a GPU are in page-locked memory, to and from which it copies by itself: 6.4 GB a layer of a 7B with 128 x
    2048 tokens.

    Args:
        device: where layers run.

    Attributes:
        in_memory: whether there is memory for them, and so for what is kept of a layer beside them.
    """

    in_memory = True

    def __init__(self, device: torch.device | None = None) -> None:
        self._for_gpu = device is not None and device.type == "cuda"
        self._overwrite = True  # but not what enters the first layer, which may be one tensor for two batches
        self._batches: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._batches[batch]

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Writes a batch of the next generation; those of the first one come in their order."""
        kept = hidden.detach()
        if kept.is_cuda or (self._for_gpu and not kept.is_pinned()):
            kept = self._copy(kept, batch)
        kept = kept.to("cpu")
        if batch == len(self._batches):
            self._batches.append(kept)
        else:
            self._batches[batch] = kept

    def advance(self, layer: str) -> None:
        """What was put becomes what is read: the outputs of this layer, or what enters the first one (`INPUTS`)."""
        if self._batches and self._batches[0].is_pinned():
            torch.cuda.synchronize()
        self._overwrite = layer != INPUTS

    def restore(self, layer: str) -> bool:
        """Whether the outputs of this layer, which an interrupted run computed, are at hand; they are current then."""
        return False

    def clear(self) -> None:
        """Lets go of all batches."""
        self._batches.clear()
        self._free.clear()

    def _copy(self, hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """A copy in the page-locked memory of the batch that it replaces, or in new one."""
        if self._overwrite and batch < len(self._batches):
            before = self._batches[batch]
            if before.is_pinned() and before.shape == hidden.shape and before.dtype == hidden.dtype:
                # behind every read of it, which the same stream began earlier; `advance` waits for it
                return before.copy_(hidden, non_blocking=True)
        if not self._free or self._free[-1].shape != hidden.shape or self._free[-1].dtype != hidden.dtype:
            count = max(1, SLAB // max(1, hidden.nbytes))
            try:
                slab = torch.empty(count, *hidden.shape, dtype=hidden.dtype, pin_memory=True)
            except RuntimeError:  # the system allows no more of it
                return hidden.to("cpu")
            self._free = list(slab)
        return self._free.pop().copy_(hidden, non_blocking=True)


class EveryOther(Activations):
    """The hidden states of the model that is binarized, behind those of the float model; only to be read.

    Args:
        both: in turn those of the float model and of the other.
        which: 1, or 0 for those of the float model.
    """

    def __init__(self, both: Activations, which: int = 1):
        super().__init__()
        self._both = both
        self._which = which

    def __len__(self) -> int:
        return len(self._both) // 2

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._both[2 * batch + self._which]
