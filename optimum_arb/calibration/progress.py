"""How far a run is: a bar in a terminal or a notebook, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import psutil
import torch
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

# In a log file, a line for each linear that took longer than this, so that nobody wonders whether the run hangs.
SLOW_LINEAR = 10.0


class Progress:
    """Says which layer is at work, how long it takes, what error it leaves, how much memory is in use, what is left.

    Silent where transformers' progress bars are turned off (`transformers.utils.logging.disable_progress_bar()`).

    Args:
        file: where lines go; stderr, as those of tqdm. The choice between a bar and lines looks at whether it is a
            terminal; in a notebook tqdm shows a widget.
    """

    def __init__(self, file: TextIO | None = None):
        self._file = file
        self._bar: tqdm | None = None
        self._lines = False
        self._total = 0
        self._done = 0
        self._skipped = 0
        self._started = 0.0
        self._errors: list[float] = []
        self._layer_errors: list[float] = []

    @contextmanager
    def running(self, total: int) -> Iterator[None]:
        """The whole run, of `total` layers."""
        file = self._file or sys.stderr
        self._total, self._done, self._skipped, self._started = total, 0, 0, time.perf_counter()
        enabled = is_progress_bar_enabled()
        shows_bars = file.isatty() or "notebook" in tqdm.__module__
        self._lines = enabled and not shows_bars
        self._bar = tqdm(
            total=total, desc="Binarizing", unit="layer", file=self._file, disable=not enabled or not shows_bars
        )
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None

    @contextmanager
    def layer(self, name: str, targets: Sequence[str]) -> Iterator[None]:
        """One layer, in which `targets` are binarized; without any it only runs."""
        start = time.perf_counter()
        self._layer_errors = []
        yield
        self._done += 1
        seconds = time.perf_counter() - start
        if not targets:  # no measure of those that are binarized: it takes a tenth of their time, or less
            self._skipped += 1
            self._started += seconds
        if self._bar is not None:
            self._bar.set_postfix(self._postfix(seconds), refresh=False)
            self._bar.update()
        parts = [f"[{self._done}/{self._total}] {name}: {len(targets)} modules" if targets else f"{name}: run again"]
        parts.append(f"{seconds:.1f} s")
        if self._layer_errors:
            parts.append(f"output error {sum(self._layer_errors) / len(self._layer_errors):.4f}")
        parts.append(memory())
        if self._done > self._skipped:
            parts.append(f"{_duration(self.seconds_left())} left")
        self._line(", ".join(parts))

    def already_done(self, name: str) -> None:
        """A layer that an interrupted run has finished and that need not even run."""
        self._done += 1
        self._skipped += 1
        if self._bar is not None:
            self._bar.update()
        self._line(f"[{self._done}/{self._total}] {name}: done before")

    def linear(self, name: str, seconds: float, errors: Sequence[float]) -> None:
        """A linear, or a module of experts, was binarized."""
        self._errors += errors
        self._layer_errors += errors
        if self._bar is not None:
            self._bar.set_postfix({"at": name, **self._postfix(seconds)}, refresh=False)
            self._bar.refresh()
        if seconds >= SLOW_LINEAR:
            error = f", output error {sum(errors) / len(errors):.4f}" if errors else ""
            self._line(f"  {name}: {seconds:.1f} s{error}")

    def seconds_left(self) -> float:
        """By the mean time of the layers that were binarized: those that were skipped, or only ran, do not count."""
        worked = self._done - self._skipped
        elapsed = time.perf_counter() - self._started
        return elapsed / worked * (self._total - self._done) if worked else 0.0

    def _postfix(self, seconds: float) -> dict[str, str]:
        shown = {"s": f"{seconds:.1f}"}
        if self._errors:
            shown["output error"] = f"{sum(self._errors) / len(self._errors):.4f}"
        shown["memory"] = memory()
        return shown

    def _line(self, text: str) -> None:
        if self._lines:
            print(text, file=self._file or sys.stderr, flush=True)


def memory() -> str:
    """The memory in use by the process, and the most that was in use of the GPU."""
    text = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    return text


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
