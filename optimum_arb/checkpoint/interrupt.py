"""Ctrl-C and SIGTERM in a run that can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it before it kills."""


@contextmanager
def interruptible(message: Callable[[], str]) -> Iterator[None]:
    """Gives an interruption in here a message, and makes one of SIGTERM.

    Args:
        message: what it says; asked when it happens. It may wait, and be interrupted again.

    Raises:
        KeyboardInterrupt: on Ctrl-C; `Terminated` on SIGTERM, where this is the main thread and SIGTERM would end it.
    """

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        try:
            said = message()
        except KeyboardInterrupt:
            said = "interrupted twice. The same call with resume=True (--resume) goes on behind what is finished."
        raise type(error)(said) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
