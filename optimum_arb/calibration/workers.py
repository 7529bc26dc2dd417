"""Calibration on the CPU whose result does not depend on the number of threads.

The libraries behind torch cut a product by the number of their threads, and with it the order of its sums: the output
of a layer with 64 rows and 1536 columns is another one with two threads than with one. So here every task, the run of
a sequence or the fit of a matrix, is one thread's, and several tasks run at once. That is also the faster way where the
machine has other work: threads that share a product wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..spare_threads import spare_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Products within are one thread's on the CPU; nothing changes on other devices."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(
    task: Callable[[Item], Result], items: Iterable[Item], device: torch.device, most: int | None = None
) -> Generator[Result, None, None]:
    """`task` of every item, without gradients; the results in the order of the items.

    On the CPU as many tasks run at once as torch may use threads, each with a single one, and with those that too few
    tasks would leave idle to spare (`spare_threads`); on other devices one after the other. The first error ends it,
    once the tasks under way have ended.

    Args:
        task: is called from several threads at once.
        items: are read as tasks begin.
        device: where the tasks compute.
        most: tasks at once, at most; what they hold is in memory together.
    """
    workers = torch.get_num_threads() if most is None else min(most, torch.get_num_threads())
    if device.type != "cpu":
        for item in items:
            with torch.no_grad():
                result = task(item)
            yield result
        return
    if workers == 1:
        for item in items:
            with one_thread(device), torch.no_grad():
                result = task(item)
            yield result
        return

    threads = torch.get_num_threads()
    spare = threads // max(len(items), 1) - 1 if isinstance(items, Sized) else 0

    def run(item: Item) -> Result:
        # a thread's own settings, which a new thread has not: no gradients, one thread
        torch.set_num_threads(1)
        with torch.no_grad(), spare_threads(max(spare, 0)):
            return task(item)

    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="optimum_arb")
    try:
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) >= workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # what new threads begin with: setting it in one changes that
