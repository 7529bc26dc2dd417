"""Memory of the process: giving back what it does not use.

glibc gives a block a mapping of its own, which ends when the block is freed, from a size on that moves: up to 32 MB
once blocks of that size have been freed. Binarizing a layer allocates and frees thousands of matrices of some
megabytes, and each new mapping is filled with zeros page by page: with mappings from 1 MB on, 24 of 104 CPU seconds of
three layers of SmolLM2-135M went into that, with 32 MB from the start 4. What is freed below stays with the process
until the end of a layer: with 16 layers of hidden size 512 at most 599 MB were resident in place of 551
(`benchmarks/streaming_memory.py`).

Once that size is set, glibc gives back what is free at the end of its memory with every free, from 128 KB on, and gets
it again, filled with zeros, with the next block: of two layers of SmolLM2-135M, 0.7 of 48 CPU seconds.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Bytes from which on a block has a mapping of its own inside `bounded_memory`.
OWN_MAPPING = 32 << 20
# Free bytes at the end of glibc's memory that it keeps there, and what it keeps unless it is told.
KEPT, USUALLY_KEPT = 1 << 30, 128 << 10


@lru_cache(maxsize=1)
def _libc() -> Any:
    """The C library where it can be told: glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") else None
    except OSError:
        return None


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Blocks from 32 MB on have mappings of their own; what smaller ones took goes back to the system in the end."""
    library = _libc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, OWN_MAPPING)
        library.mallopt(_M_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(_M_TRIM_THRESHOLD, USUALLY_KEPT)
        give_back_memory()


def give_back_memory() -> None:
    """Gives small blocks that were freed back to the system."""
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


def free_on(device: torch.device) -> int:
    """Bytes of a GPU that are free, with what torch keeps of it unused."""
    if not torch.cuda.is_available():
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
