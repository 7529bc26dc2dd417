"""Launches that are made ready once and then run by one native call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .calls import Entry
from .launch import Launch, Ready, hooked
from .native_launch import SCRATCH, NativeLaunches, Slot, prepare
from .outputs import Outputs, current_stream, empty_vector

# A launch and all its arguments: tensors, or slots
Step: TypeAlias = tuple[Launch, tuple[Any, ...]]
# What lies from this byte of the scratch memory on, as a vector of this dtype or as a slot
Memory: TypeAlias = Callable[[int, torch.dtype], Any]


def slots(offset: int, dtype: torch.dtype) -> Slot:
    """`Memory` of a run that is not known yet."""
    return Slot(SCRATCH, offset)


def memory_of(scratch: torch.Tensor) -> Memory:
    """`Memory` in these bytes."""
    return lambda offset, dtype: scratch[offset:].view(dtype)


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Changes when one of these is written, as far as torch knows."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class ReadyLaunches(ABC):
    """Launches with all but a few addresses known, which run by Triton first, which compiles, then by one native call.

    The weights' tensors are to stay where they are, though they may be written.

    Args:
        device: of all tensors.

    Attributes:
        native: the native launches, once they were made.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.native: NativeLaunches | None = None
        self._ran = self._tried = False
        self._read: list[torch.Tensor] = []  # what copies that the native launches read were made of
        self._versions: list[int] = []

    def copied(self) -> list[torch.Tensor]:
        """The weights' tensors of which the launches read copies, which have to be made anew when these are written."""
        return []

    @abstractmethod
    def ready(self) -> list[Ready | None]:
        """The launches that a first run has compiled, with slots for what changes."""

    def native_now(self) -> NativeLaunches | None:
        """The native launches, where a run is to take them."""
        if self._ran and not self._tried:
            self._prepare_native()
        native = self.native
        if native is None or hooked():
            return None
        if self._read and versions(self._read) != self._versions:
            self._tried = False  # the column scales were written
            return None
        return native

    def _entry(
        self,
        shape: torch.Size,
        outputs: Sequence[Outputs],
        dtype: torch.dtype,
        scratch: int,
        extra: int,
        read: Sequence[torch.Tensor] = (),
    ) -> Entry | None:
        """A run for inputs of this shape as `_calls` takes it; None where there are no native launches."""
        native = self.native_now()
        if native is None:
            return None
        results = tuple(each.arguments(shape) for each in outputs)
        memory = ((scratch,), (1,), torch.uint8) if scratch else None
        counted = [tensor for tensor in [*self._read, *read] if not tensor.is_inference()]
        written = tuple(each for tensor in counted for each in (tensor, tensor._version))
        one = len(outputs) == 1
        return Entry(shape, dtype, self.device.index, native, native.address, extra, results, memory, written, one)

    def _prepare_native(self) -> None:
        read = self.copied()
        if read and torch.cuda.is_current_stream_capturing():
            return  # a copy made now would belong to the graph
        seen = versions(read)
        # in this order, for another thread that runs meanwhile: new launches with an old version are not used
        self.native = prepare(self.ready(), self.device)
        self._read, self._versions = read, seen
        self._tried = True


class ReadyProduct(ReadyLaunches):
    """The launches of one product.

    Args:
        device: of all tensors.
        dtype: of x.
        outputs: the result.

    Attributes:
        scratch: bytes that the launches need beside it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, outputs: Outputs):
        super().__init__(device)
        self.dtype = dtype
        self.scratch = 0
        self._outputs = outputs

    @abstractmethod
    def _run_by_triton(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`run`, which the native launches are made of."""

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, on the current device."""
        native = self.native_now()
        if native is None:
            return self._run_by_triton(x, bias)
        out = self._outputs.empty(x.shape)
        scratch = empty_vector(self.scratch, torch.uint8) if self.scratch else out
        native.run(
            current_stream(self.device.index),
            x.data_ptr(),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            scratch.data_ptr(),
        )
        return out

    def entry(self, shape: torch.Size, bias: torch.Tensor | None) -> Entry | None:
        """`run` of inputs `[..., K]` of this shape with this bias, contiguous and 16-byte aligned."""
        extra = 0 if bias is None else bias.data_ptr()
        return self._entry(shape, [self._outputs], self.dtype, self.scratch, extra)
