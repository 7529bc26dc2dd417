"""What a layer, or the layers of one input, keep ready for inputs of a kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import is_, itemgetter
from typing import Any, Generic, TypeVar

import torch

MAX_PLANS = 32  # of a layer: prompts come in many lengths
MAX_SHAPES = 128

# `torch.cuda.current_device` without its question whether CUDA was started: a tensor is there
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

_ADDRESS = torch.Tensor.data_ptr
P = TypeVar("P")


class Plans(dict[tuple[Hashable, ...], "P | None"], Generic[P]):
    """Products that were made ready for inputs of a kind, of the tensors of a matrix as they are now.

    Args:
        tensors: those that there are of `optimum_arb.format.packing.TENSOR_NAMES`, as the operator takes them; for the
            layers of one input those of all, and what else the plans read.
        backend: of the matrix.

    Attributes:
        call: takes an input to its result, or to None where the host has to look at it; None before one is ready.
    """

    __slots__ = ("_addresses", "_ready", "_tensors", "backend", "call")

    def __init__(self, tensors: Sequence[torch.Tensor], backend: str):
        super().__init__()
        self.backend = backend
        self._tensors = [*tensors]
        self._addresses = [*map(_ADDRESS, tensors)]
        self.call: Any = None
        self._ready: dict[torch.Size, Any] = {}  # shapes of inputs -> the launches of their calls

    def keep(
        self,
        plan: Any,
        shape: torch.Size,
        bias: torch.Tensor | None,
        watched: Callable[[], Sequence[tuple[dict[str, Any], str]]],
    ) -> None:
        """Makes `call` ready for inputs of a shape that a plan has just computed, if it launches natively.

        Args:
            plan: one of these.
            shape: of the input.
            bias: that was added.
            watched: gives the dicts and keys of all tensors that plans read.
        """
        native = getattr(plan, "native", None)
        if native is None or self._ready.get(shape) is native or len(self._ready) > MAX_SHAPES:
            return
        if self.call is None:
            from ..ops.backends.triton.calls import make_calls

            self.call = make_calls(watched())
        entry = None if self.call is None else plan.entry(shape, bias)
        if entry is not None:
            self.call.add(*entry)
        if entry is not None or self.call is None:
            self._ready[shape] = native

    def fit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, at the same places in memory; they may have been written."""
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            return False
        return [*map(_ADDRESS, tensors)] == self._addresses


class Sources:
    """The tensors that a copy was made of.

    Asked at every call for few tokens, where a GPU waits for the host. So places and addresses are looked at of the
    signs alone, which are replaced with the rest, and of all tensors the versions.

    Args:
        layers: of each, dicts and keys where its tensors stand; and its bias, or None, which was not copied, and may be
            written or replaced.
    """

    __slots__ = ("_signs", "_versions")

    def __init__(self, *layers: tuple[Sequence[tuple[dict[str, Any], str]], torch.Tensor | None]):
        self._signs: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self._versions: list[tuple[torch.Tensor, int]] = []  # held, so that no other tensor comes to where they are
        for places, bias in layers:
            for values, key in places:
                tensor = values[key]
                if tensor is None or tensor is bias:
                    continue
                if tensor.dtype == torch.uint8:
                    self._signs.append((values, key, tensor, tensor.data_ptr()))
                if not tensor.is_inference():
                    self._versions.append((tensor, tensor._version))

    def same(self) -> bool:
        """Whether the tensors are still there, and were not written, as far as torch knows."""
        for values, key, tensor, address in self._signs:
            if values[key] is not tensor or tensor.data_ptr() != address:
                return False
        for tensor, version in self._versions:  # noqa: SIM110 (half a generator's time)
            if tensor._version != version:
                return False
        return True


def getter(keys: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What reads the values of these keys, all at once: a third of the time of asking for one after another."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda values: tuple(values[key] for key in keys)
