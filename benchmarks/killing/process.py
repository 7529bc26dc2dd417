"""Forked processes that stop: before an operation on files, at a limit, or for want of rights."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# What is counted as an operation on files: Python's audit events of these names.
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.dlsym", "mmap.")
_NOBODY = 65534


def fork() -> int:
    """`os.fork`, with Ctrl-C held back in the child until `run_child` is there to end it: the child would go on as its
    parent, and remove what is the parent's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def run_child(before: Callable[[], None], work: Callable[[], None]) -> None:
    """What a process from `fork` does; it never returns."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
        left[0] -= 1
        if left[0] == -1:  # once, though the signal may raise here
            os.kill(os.getpid(), number)

    on_events(act)


def lower(limit: int, value: int) -> None:
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def address_space(key: str = "VmSize") -> int:
    """Bytes of the address space of this process, or the most that it was ("VmPeak")."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def take_rights() -> None:
    """This process may do no more than any user."""
    if os.getuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def give_away(folder: Path) -> None:
    """Makes a directory, with all that is in it, that of the user without rights."""
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, _NOBODY, _NOBODY)


def set_writable(folder: Path, writable: bool) -> None:
    """Whether files may be made in a directory and those below it, and removed."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(FileNotFoundError):  # which a process has just moved
            os.chmod(path, 0o755 if writable else 0o555)
