"""Threads that are idle while a task of one thread runs, for parts of it that are one thread's too.

What a task computes is the same with and without them: they run whole steps, never half of a sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_of_this_thread = threading.local()


@contextmanager
def spare_threads(count: int) -> Iterator[None]:
    """What this thread does within may use `count` more threads."""
    before = spare_now()
    _of_this_thread.count = count
    try:
        yield
    finally:
        _of_this_thread.count = before


def spare_now() -> int:
    """How many more threads this one may use."""
    return getattr(_of_this_thread, "count", 0)


def ahead(task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`task` of every item in order; with a spare thread, that of the next item is under way while the caller works
    with the last result. Without gradients."""
    if not spare_now():
        for item in items:
            with torch.no_grad():
                result = task(item)
            yield result
        return

    def run(item: Item) -> Result:
        # settings of a thread, which a new one has not
        torch.set_num_threads(1)
        with torch.no_grad():
            return task(item)

    with ThreadPoolExecutor(1, thread_name_prefix="optimum_arb_ahead") as pool:
        following = None
        for item in items:
            last, following = following, pool.submit(run, item)
            if last is not None:
                yield last.result()
        if following is not None:
            yield following.result()
