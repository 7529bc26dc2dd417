"""What a layer, or the layers of one input, keep ready for inputs of a kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

MAX_PLANS = 32  # of a layer: prompts come in many lengths

# `torch.cuda.current_device` without its question whether CUDA was started: a tensor is there
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

_ADDRESS = torch.Tensor.data_ptr
P = TypeVar("P")


class Plans(dict[tuple[Hashable, ...], "P | None"], Generic[P]):
    """Products that were made ready for inputs of a kind, of the tensors of a matrix as they are now.

    Args:
        tensors: of `optimum_arb.format.packing.TENSOR_NAMES`, as the operator takes them; those of several matrices,
            and others that the plans read, for the layers of one input.
        backend: of the matrix.
    """

    __slots__ = ("_addresses", "_ids", "_there", "backend")

    def __init__(self, tensors: list[torch.Tensor | None], backend: str):
        super().__init__()
        self.backend = backend
        self._ids = [*map(id, tensors)]  # of tensors that live as long as this
        self._there = [tensor for tensor in tensors if tensor is not None]
        self._addresses = [*map(_ADDRESS, self._there)]

    def fit(self, tensors: list[torch.Tensor | None]) -> bool:
        """Whether these are the same tensors, at the same places in memory; they may have been written."""
        if [*map(id, tensors)] != self._ids:
            return False
        return [*map(_ADDRESS, self._there)] == self._addresses
