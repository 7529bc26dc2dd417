"""Several tasks of the calibration at once, with results that do not depend on how many run.

The libraries behind torch cut a product by the number of their threads, and with it the order of its sums: the output
of a layer with 64 rows and 1536 columns is another one with two threads than with one. So here every task, the run of
a sequence or the fit of a matrix, is one thread's, and several tasks run at once. That is also the faster way where the
machine has other work: threads that share a product wait for each other.

On a GPU a fit of a small matrix is some ten thousand short kernels, and it is the host that takes the time: 0.3 s a
matrix of SmolLM2-135M by `arb-dbf`, of which the GPU works for 0.1. There, fits run in threads with a stream each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from queue import SimpleQueue
from typing import TypeVar

import torch

from ..spare_threads import Spare, sharing_spare

# Bytes of a GPU that torch may keep for one stream, out of the reach of all others.
MOST_IDLE = 1 << 29

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
    task: Callable[[Item], Result],
    items: Iterable[Item],
    device: torch.device,
    most: int | None = None,
    streams: int = 1,
) -> Generator[Result, None, None]:
    """`task` of every item, without gradients; the results in the order of the items.

    On the CPU as many tasks run at once as torch may use threads, each with a single one, and with those to spare that
    too few tasks leave idle, or the last ones do (`spare_threads`); on a GPU as many as `streams`, each on a stream of
    its own; on other devices one after the other. The first error ends it, once the tasks under way have ended.

    Args:
        task: is called from several threads at once.
        items: are read as tasks begin.
        device: where the tasks compute.
        most: tasks at once, at most; what they hold is in memory together.
        streams: tasks at once on a GPU, at most.
    """
    if device.type == "cuda" and streams > 1:
        yield from _on_streams(task, items, device, streams)
        return
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
    left = [None] * len(items) if isinstance(items, Sized) else None  # a list, which threads may shorten at once
    spare = Spare(threads - 1, lambda: threads // max(len(left), 1) - 1 if left is not None else 0)

    def run(item: Item) -> Result:
        # a thread's own settings, which a new thread has not: no gradients, one thread
        torch.set_num_threads(1)
        try:
            with torch.no_grad(), sharing_spare(spare):
                return task(item)
        finally:
            if left:
                left.pop()

    try:
        yield from _pooled(run, items, workers, workers + 1)
    finally:
        spare.close()
        torch.set_num_threads(threads)  # what new threads begin with: setting it in one changes that


def _pooled(
    run: Callable[[Item], Result], items: Iterable[Item], workers: int, most: int
) -> Generator[Result, None, None]:
    """By so many threads; at most `most` tasks are under way or wait, so that with one more than there are threads none
    of these is idle while a result is used."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="optimum_arb")
    try:
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_streams(
    task: Callable[[Item], Result], items: Iterable[Item], device: torch.device, streams: int
) -> Generator[Result, None, None]:
    """A task begins on its stream when what was asked of the GPU before is done, and has ended there when it returns;
    all have before the first result is handed out. So their tensors may be used and let go of as if there were no
    streams: memory that goes back to one is taken again by a later call's tasks only, behind what used it between."""
    idle: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
    for stream in _streams(device, streams):
        idle.put(stream)
    before = torch.cuda.current_stream(device).record_event()

    def run(item: Item) -> Result:
        stream = idle.get()
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
                stream.wait_event(before)
                try:
                    return task(item)
                finally:
                    stream.synchronize()
        finally:
            idle.put(stream)

    _give_back(device)
    results = deque(_pooled(run, items, streams, streams))
    _give_back(device)
    while results:
        yield results.popleft()


def _give_back(device: torch.device) -> None:
    if torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > MOST_IDLE:
        torch.cuda.empty_cache()


@lru_cache(maxsize=16)
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """The same ones in every call: torch keeps freed memory for each by itself."""
    # torch loads its library of solvers with the first call of one, and fails where two threads make that at once
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))
    return [torch.cuda.Stream(device) for _ in range(count)]
