"""New tensors on the current GPU, by the shortest way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

MOST_SHAPES = 32  # of inputs, that results are known for

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# What code that torch compiled calls; it takes the current device. `torch.empty` takes the host twice as long.
_empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)


# Sizes, strides and dtype of a tensor that `_empty` makes
Allocation: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def aligned(size: int) -> int:
    """Bytes up to where another tensor may begin, as torch aligns its own."""
    return -(-size // 512) * 512


def empty_vector(size: int, dtype: torch.dtype) -> torch.Tensor:
    """`[size]` on the current GPU."""
    return _empty((size,), (1,), dtype)


class Outputs:
    """Results `[..., rows]` for inputs `[..., K]` of a number of tokens, which come in a few shapes.

    Args:
        rows: see above.
        dtype: of the results.
    """

    __slots__ = ("_dtype", "_known", "_rows")

    def __init__(self, rows: int, dtype: torch.dtype):
        self._rows, self._dtype = rows, dtype
        self._known: dict[torch.Size, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def empty(self, shape: torch.Size) -> torch.Tensor:
        """A result on the current GPU for an input of this shape."""
        known = self._of(shape)
        return _empty(known[0], known[1], self._dtype)

    def arguments(self, shape: torch.Size) -> Allocation:
        """Those of the allocation of such a result."""
        return *self._of(shape), self._dtype

    def _of(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        known = self._known.get(shape)
        if known is None:
            of_result = (*shape[:-1], self._rows)
            strides = [1]
            for size in of_result[:0:-1]:
                strides.insert(0, strides[0] * size)
            known = of_result, tuple(strides)
            if len(self._known) < MOST_SHAPES:
                self._known[shape] = known
        return known
