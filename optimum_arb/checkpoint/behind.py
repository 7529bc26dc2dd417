"""`Behind`: what a walk leaves to a thread, so that it need not wait for a disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)


class Behind:
    """One task at a time, in a thread; its error is raised where the next one is handed over, or by `settle`.

    A thread for each task, and no pool: whatever becomes of a thread that runs out of memory, `join` comes back.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._begun = threading.Event()
        self._error: BaseException | None = None

    def do(self, task: Callable[[], None]) -> None:
        """Begins a task once the one before has ended.

        Raises:
            BaseException: what the task before raised; this one is not begun then.
            RuntimeError: no thread can be started.
        """
        self.settle()

        def run() -> None:
            self._begun.set()
            try:
                task()
                self._error = None
            except BaseException as error:
                self._error = error

        self._begun.clear()
        self._error = MemoryError("A thread ended before its task did.")  # which puts another one here, or none
        self._thread = threading.Thread(target=run, name="optimum_arb-behind")
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):
            self._thread = self._error = None
            raise

    def wait(self) -> None:
        """Until nothing is under way. An interruption ends the waiting, and not the task."""
        if self._thread is not None:
            self._begun.wait(1)  # after an interruption of `start`
            with suppress(RuntimeError):  # it was not started
                self._thread.join()
            self._thread = None

    def settle(self) -> None:
        """Until nothing is under way.

        Raises:
            BaseException: what the task raised, once.
        """
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Until nothing is under way, at the end of a run that may have ended with an error of its own.

        Raises:
            KeyboardInterrupt: once the task has ended; what it writes must not meet the next run's.
        """
        interruption: KeyboardInterrupt | None = None
        while True:
            try:
                self.wait()
                break
            except KeyboardInterrupt as another:
                interruption = another
        error, self._error = self._error, None
        if error is not None:
            logger.warning("What was finished last could not be kept: %s", str(error) or type(error).__name__)
        if interruption is not None:
            raise interruption
