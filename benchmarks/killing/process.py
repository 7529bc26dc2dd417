"""Forked processes that stop: before an operation on files, at a limit, or for want of rights."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

# What is counted as an operation on files: Python's audit events of these names.
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.dlsym", "mmap.")
_NOBODY = 65534


def run_child(before: Callable[[], None], work: Callable[[], None]) -> None:
    """What a forked process does; it never returns."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        before()
        work()
    except BaseException:
        if os.environ.get("KILL_SAVES_VERBOSE"):
            with open("/dev/tty" if os.path.exists("/dev/tty") else os.devnull, "w") as terminal:
                traceback.print_exc(file=terminal)
        os._exit(1)
    os._exit(0)


def on_events(act: Callable[[], None]) -> None:
    """Calls `act` before every operation on files of this process, from now on."""
    active = [False]

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(_EVENTS) and not active[0]:
            active[0] = True
            try:
                act()
            finally:
                active[0] = False

    sys.addaudithook(hook)


def stop_at(event: int, number: signal.Signals) -> None:
    """Sends this process a signal right before one of its operations on files."""
    left = [event]

    def act() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), number)
        left[0] -= 1

    on_events(act)


def lower(limit: int, value: int) -> None:
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def virtual_bytes() -> int:
    """The address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def drop_rights() -> None:
    """This process may do no more than any user."""
    if os.getuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
