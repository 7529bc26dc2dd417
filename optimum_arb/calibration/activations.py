"""The hidden states between two layers, for all batches of the calibration."""

from __future__ import annotations

from collections import deque
from functools import lru_cache

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
        self._written: torch.cuda.Event | None = None  # behind the last copy from a GPU

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
        if self._written is not None:  # not for all that the GPU does: what another one sends may still be on its way
            self._written.synchronize()
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
                return self._write(before, hidden)
        if not self._free or self._free[-1].shape != hidden.shape or self._free[-1].dtype != hidden.dtype:
            count = _in_a_slab(max(1, hidden.nbytes))
            try:
                slab = torch.empty(count, *hidden.shape, dtype=hidden.dtype, pin_memory=True)
            except RuntimeError:  # the system allows no more of it
                return hidden.to("cpu")
            self._free = list(slab)
        return self._write(self._free.pop(), hidden)

    def _write(self, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Copies beside what the GPU computes: 0.16 of the 3.4 s of a 7B's layer, and behind every read of the same
        memory, which the same stream began earlier; `advance` waits for it."""
        if not hidden.is_cuda:
            return kept.copy_(hidden)
        stream = copying_stream(hidden.device)
        stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(stream):
            kept.copy_(hidden, non_blocking=True)
        self._written = stream.record_event()
        hidden.record_stream(stream)
        return kept


def _in_a_slab(size: int) -> int:
    """How many batches of so many bytes are taken at once, so that what torch rounds up to is used: one of 80 MB would
    take 128, three of them take 256."""
    least = max(1, SLAB // size)
    return min(range(least, least + 8), key=lambda count: (1 << (count * size - 1).bit_length()) / (count * size))


class CopiedAhead:
    """Hidden states on a GPU: where batch follows batch, each is copied there while the one before it runs.

    A layer of a 7B runs eight times over 128 x 2048 tokens, of which each takes 40 ms to copy. Nothing may write to a
    batch that comes later than the last one asked for. The host waits for the GPU where it is two batches ahead: memory
    of a copy is free again when the GPU is done with it, not before, and took 2 GB more of a 7B's run without the wait.

    Args:
        inputs: where they lie; from page-locked memory the host need not wait for a copy.
        count: batches.
        device: the GPU.
    """

    def __init__(self, inputs: Activations, count: int, device: torch.device):
        self._inputs = inputs
        self._count = count
        self._device = device
        self._ahead: tuple[int, torch.Tensor, torch.cuda.Event] | None = None
        self._last = -1
        self._under_way: deque[torch.cuda.Event] = deque()

    def __getitem__(self, batch: int) -> torch.Tensor:
        if self._ahead is None or self._ahead[0] != batch:
            self._ahead = self._copy(batch)
        _, hidden, done = self._ahead
        here = torch.cuda.current_stream(self._device)
        self._under_way.append(here.record_event())
        if len(self._under_way) > 2:
            self._under_way.popleft().synchronize()
        here.wait_event(done)
        hidden.record_stream(here)
        follows = batch == self._last + 1 and batch + 1 < self._count
        self._ahead, self._last = self._copy(batch + 1) if follows else None, batch
        return hidden

    def _copy(self, batch: int) -> tuple[int, torch.Tensor, torch.cuda.Event]:
        stream = copying_stream(self._device)
        with torch.cuda.stream(stream):
            return batch, self._inputs[batch].to(self._device, non_blocking=True), stream.record_event()


def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which hidden states go to a GPU and come from it, in the order in which that was asked for."""
    return _copying_stream(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=16)
def _copying_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


class OnDevice(Activations):
    """What stays on the device where it was computed; nothing may write to it."""

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        self._batches[batch : batch + 1] = [hidden.detach()]


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
