"""Memory of the process: what it holds, and giving back what it does not use."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _libc() -> Any:
    """The C library where it can be told to give memory back: glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") else None
    except OSError:
        return None


def give_back_memory() -> None:
    """Gives freed memory back to the system, which glibc keeps for later: after a layer, much of what it took."""
    library = _libc()
    if library is not None:
        library.malloc_trim(0)
