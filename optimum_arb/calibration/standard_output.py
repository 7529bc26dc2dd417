"""Standard output for results alone, also where a library's C++ code prints to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def to_standard_error() -> Iterator[None]:
    """What the process writes to standard output meanwhile goes to standard error.

    Gloo of torch 2.8 prints "[Gloo] Rank 0 is connected to 1 peer ranks" there, in front of the JSON of `--json`.
    """
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        with suppress(OSError):  # standard error is closed
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
