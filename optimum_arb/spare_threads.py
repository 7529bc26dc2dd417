"""Threads that are idle while a task of one thread runs, for parts of it that are one thread's too.

What a task computes is the same with and without them. How it is cut follows from its shapes alone, and no thread's
part is a part of a sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

# Rows of a product that one thread makes, at least: fewer read the right factor too often.
ROWS = 192
# Multiplications below which a product is not cut: some 0.2 ms, of which handing half of it over would take a tenth.
LEAST = 1 << 23

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Spare:
    count: int
    pool: ThreadPoolExecutor | None = None  # made when it is first used


_of_this_thread = threading.local()


def _spare() -> _Spare:
    return getattr(_of_this_thread, "spare", None) or _Spare(0)


def spare_now() -> int:
    """How many more threads this one may use."""
    return _spare().count


@contextmanager
def spare_threads(count: int) -> Iterator[None]:
    """What this thread does within may use `count` more threads."""
    before, spare = getattr(_of_this_thread, "spare", None), _Spare(count)
    _of_this_thread.spare = spare
    try:
        yield
    finally:
        _of_this_thread.spare = before
        if spare.pool is not None:
            spare.pool.shutdown(wait=True, cancel_futures=True)


def _submit(task: Callable[[Item], Result], item: Item) -> Future[Result]:
    spare = _spare()
    if spare.pool is None:
        # a thread's own setting, which a new thread has not
        initializer = lambda: torch.set_num_threads(1)  # noqa: E731
        spare.pool = ThreadPoolExecutor(spare.count, "optimum_arb_spare", initializer)

    def run() -> Result:
        with torch.no_grad():
            return task(item)

    return spare.pool.submit(run)


def ahead(task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`task` of every item in order; with a spare thread, that of the next item is under way while the caller works
    with the last result. Without gradients."""
    if not spare_now():
        for item in items:
            with torch.no_grad():
                result = task(item)
            yield result
        return
    following = None
    for item in items:
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
    rows = len(left)
    parts = rows // ROWS // 2 * 2
    if left.device.type != "cpu" or parts < 2 or left.numel() * right.shape[1] < LEAST:
        return left @ right
    result = left.new_empty(rows, right.shape[1])

    def fill(index: int) -> None:
        part = slice(index * rows // parts, (index + 1) * rows // parts)
        torch.mm(left[part], right, out=result[part])

    in_parts(fill, range(parts))
    return result
