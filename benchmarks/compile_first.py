"""Compiles what a benchmark will time in processes beside each other, before it times anything."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any

import torch


def compile_first(
    run: Callable[..., Any], tasks: Collection[tuple[Any, ...]], workers: int, seconds: float | None = None
) -> None:
    """Runs every task once in one of several processes, for Triton to keep what it compiles.

    The package's `tune` divides its shapes among its processes beforehand; here whoever is free takes the next task,
    as tasks differ much in what they compile.

    Args:
        run: what a task's values are given to, a function that a new process can import. An error is left to the
            timing, where it comes again and is told.
        tasks: the values of each.
        workers: the number of processes.
        seconds: after which the processes are ended and the rest is compiled while it is timed; None: never.
    """
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        try:
            pool.map_async(partial(_attempt, run), tasks, chunksize=1).get(seconds)
        except multiprocessing.TimeoutError:
            print(f"not everything was compiled after {seconds:.0f} s", flush=True)
        else:
            print(f"compiled {len(tasks)} in {time.monotonic() - start:.0f} s", flush=True)


def _attempt(run: Callable[..., Any], task: tuple[Any, ...]) -> None:
    with suppress(Exception), torch.no_grad():
        run(*task)
        torch.cuda.synchronize()
    with suppress(Exception):
        torch.cuda.empty_cache()  # the other processes need memory too
