"""Threads that are idle while a task of one thread runs, for parts of it that are one thread's too.

What a task computes is the same with and without them. How it is cut follows from its shapes alone, and no thread's
part is a part of a sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

# Rows of a product that one thread makes, at least: fewer read the right factor too often.
ROWS = 192
# Multiplications below which a product is not cut: some 0.2 ms, of which handing half of it over would take a tenth.
LEAST = 1 << 23

Item = TypeVar("Item")
Result = TypeVar("Result")


class Spare:
    """Threads that one or several tasks, each of one thread, may use beside their own.

    Args:
        most: how many there are.
        now: how many of them a task may use at the moment; all unless given.
    """

    def __init__(self, most: int, now: Callable[[], int] | None = None):
        self._most = most
        self._now = now
        self._pool: ThreadPoolExecutor | None = None  # made when it is first used
        self._lock = threading.Lock()

    def count(self) -> int:
        """How many a task may use now."""
        return self._most if self._now is None else max(0, min(self._most, self._now()))

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        with self._lock:
            if self._pool is None:
                # a thread's own setting, which a new thread has not
                initializer = lambda: torch.set_num_threads(1)  # noqa: E731
                self._pool = ThreadPoolExecutor(self._most, "optimum_arb_spare", initializer)
            return self._pool.submit(task)

    def close(self) -> None:
        """Waits for what is under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_of_this_thread = threading.local()
_NONE = Spare(0)


def _spare() -> Spare:
    return getattr(_of_this_thread, "spare", _NONE)


def spare_now() -> int:
    """How many more threads this one may use."""
    return _spare().count()


@contextmanager
def sharing_spare(spare: Spare) -> Iterator[None]:
    """What this thread does within may use these threads, as others may."""
    before = _spare()
    _of_this_thread.spare = spare
    try:
        yield
    finally:
        _of_this_thread.spare = before


@contextmanager
def spare_threads(count: int) -> Iterator[None]:
    """What this thread does within may use `count` more threads."""
    spare = Spare(count)
    try:
        with sharing_spare(spare):
            yield
    finally:
        spare.close()


def _submit(task: Callable[[Item], Result], item: Item) -> Future[Result]:
    def run() -> Result:
        with torch.no_grad():
            return task(item)

    return _spare().submit(run)


def ahead(task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`task` of every item in order; with a spare thread, that of the next item is under way while the caller works
    with the last result. Without gradients."""
    following = None
    for item in items:
        if following is None and not spare_now():
            with torch.no_grad():
                result = task(item)
            yield result
            continue
        last, following = following, _submit(task, item)
        if last is not None:
            yield last.result()
    if following is not None:
        yield following.result()


def in_parts(task: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`task` of every item, in order, by this thread and those to spare. Without gradients."""
    with torch.no_grad():
        if not spare_now():
            return [task(item) for item in items]
        handed = [(item, _submit(task, item)) for item in items[1:]]
        results = [task(items[0])]
        # what no other thread has begun is done here
        results += [task(item) if future.cancel() else future.result() for item, future in handed]
    return results


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` of matrices; on the CPU by parts of its rows, each one thread's."""
    parts = _parts(left, right)
    if len(parts) == 1:
        return left @ right
    result = left.new_empty(len(left), right.shape[1])
    in_parts(lambda part: torch.mm(left[part], right, out=result[part]), parts)
    return result


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds `left @ right` to a matrix, by the same parts."""
    in_parts(lambda part: total[part].addmm_(left[part], right), _parts(left, right))


def _parts(left: torch.Tensor, right: torch.Tensor) -> list[slice]:
    rows = len(left)
    parts = rows // ROWS // 2 * 2
    if left.device.type != "cpu" or parts < 2 or left.numel() * right.shape[1] < LEAST:
        return [slice(None)]
    return [slice(index * rows // parts, (index + 1) * rows // parts) for index in range(parts)]
