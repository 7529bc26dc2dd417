"""What the fits of several weights under one calibration matrix have in common, made once: query, key and value, say.

`arb-hrc` factorizes the matrix six times for a fit, `arb-dbf` wants its eigenvectors; neither looks at the weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_of_this_thread = threading.local()


class SharedWork:
    """Results by the matrix that they are made of. The fits may run in several threads, on streams of their own.

    Args:
        matrix: what they share.
    """

    def __init__(self, matrix: torch.Tensor):
        self._lock = threading.Lock()
        self._matrices = {id(matrix): matrix}  # with the tensors, whose ids are not others' while they are here
        self._entries: dict[Hashable, _Entry] = {}

    def get(self, matrix: torch.Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave another fit."""
        if id(matrix) not in self._matrices:
            return make()
        with self._lock:
            entry = self._entries.setdefault((id(matrix), key), _Entry())
        return entry.get(matrix.device, make)

    def share(self, matrix: torch.Tensor) -> None:
        """Results of this matrix, itself one that fits share, are shared too."""
        with self._lock:
            self._matrices[id(matrix)] = matrix


class _Entry:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[Any, torch.cuda.Event | None] | None = None

    def get(self, device: torch.device, make: Callable[[], Any]) -> Any:
        with self._lock:
            if self._made is None:
                result = make()
                here = torch.cuda.current_stream(device) if device.type == "cuda" else None
                self._made = result, None if here is None else here.record_event()
            result, done = self._made
        if done is not None:
            torch.cuda.current_stream(device).wait_event(done)
        return result


@contextmanager
def sharing(work: SharedWork | None) -> Iterator[None]:
    """What this thread makes within by `once` is shared with others that do so with the same `work`."""
    before = getattr(_of_this_thread, "work", None)
    _of_this_thread.work = work
    try:
        yield
    finally:
        _of_this_thread.work = before


def once(matrix: torch.Tensor, key: Hashable, make: Callable[[], Result]) -> Result:
    """`make()`, by the first of the fits that share this matrix and ask for the same key. Nothing may write to it."""
    work: SharedWork | None = getattr(_of_this_thread, "work", None)
    return make() if work is None else work.get(matrix, key, make)


def share(matrix: torch.Tensor) -> None:
    """Of a result of `once`, by which further results are known."""
    work: SharedWork | None = getattr(_of_this_thread, "work", None)
    if work is not None:
        work.share(matrix)
