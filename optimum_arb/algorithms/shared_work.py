"""What the fits of several weights under one calibration matrix have in common, made once: query, key and value, say.

`arb-hrc` factorizes the matrix six times for a fit, `arb-dbf` wants its eigenvectors; neither looks at the weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_of_this_thread = threading.local()


@dataclass(frozen=True)
class Part(Generic[Result]):
    """Something that fits make of a matrix.

    Attributes:
        matrix: of which.
        key: tells it from what else is made of the matrix.
        make: makes it; looks at no weight.
    """

    matrix: torch.Tensor
    key: Hashable
    make: Callable[[], Result]

    def once(self) -> Result:
        """As the function `once`."""
        return once(self.matrix, self.key, self.make)


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
            if entry.uses is not None:
                entry.uses -= 1
                if not entry.uses:
                    del self._entries[id(matrix), key]
        return entry.get(matrix.device, make)

    def put(
        self,
        part: Part[Any],
        result: Any,
        uses: int | None = None,
        arrived: Callable[[], None] | None = None,
    ) -> None:
        """What was made elsewhere, or before the fits.

        Args:
            part: what it is.
            result: what `part.make` gives.
            uses: by how many fits; the last one that asks for it takes it away. None keeps it.
            arrived: is called by each before it is used, where its tensors are still on their way.
        """
        self.share(part.matrix)
        self._entries[id(part.matrix), part.key] = _Entry((result, None), uses, arrived)

    def take(self, matrix: torch.Tensor, key: Hashable) -> Any:
        """What was put here for this key, taken away; None if nothing was."""
        with self._lock:
            entry = self._entries.pop((id(matrix), key), None)
        return None if entry is None else entry.get(matrix.device, lambda: None)

    def share(self, matrix: torch.Tensor) -> None:
        """Results of this matrix, itself one that fits share, are shared too."""
        with self._lock:
            self._matrices[id(matrix)] = matrix


class _Entry:
    def __init__(
        self,
        made: tuple[Any, torch.cuda.Event | None] | None = None,
        uses: int | None = None,
        arrived: Callable[[], None] | None = None,
    ) -> None:
        self.uses = uses
        self._lock = threading.Lock()
        self._made = made
        self._arrived = arrived

    def get(self, device: torch.device, make: Callable[[], Any]) -> Any:
        with self._lock:
            if self._made is None:
                result = make()
                here = torch.cuda.current_stream(device) if device.type == "cuda" else None
                self._made = result, None if here is None else here.record_event()
            result, done = self._made
            if self._arrived is not None:
                self._arrived()
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


def made_elsewhere(matrix: torch.Tensor, key: Hashable) -> Any:
    """What another rank made of this matrix for this very fit; None where this one is to make it."""
    work: SharedWork | None = getattr(_of_this_thread, "work", None)
    return None if work is None else work.take(matrix, key)


def also_elsewhere(task: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """A task that shares what this thread does now, in whichever thread it runs."""
    work: SharedWork | None = getattr(_of_this_thread, "work", None)

    def run(item: Item) -> Result:
        with sharing(work):
            return task(item)

    return run


def share(matrix: torch.Tensor) -> None:
    """Of a result of `once`, by which further results are known."""
    work: SharedWork | None = getattr(_of_this_thread, "work", None)
    if work is not None:
        work.share(matrix)
