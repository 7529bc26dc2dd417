"""Files that hold the result of work: asked for before it, whole or as they were after it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# A disk, or what of it is a user's, is full: Python tells it without the name of the file.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Directories that are missing are made when the file is written, and are no error.

    Raises:
        IsADirectoryError: the path is a directory.
        NotADirectoryError: a parent of it is a file.
        PermissionError: neither the file nor its directory can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file.")
    existing = path.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {existing} is a file. Choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {existing} is not writable. Choose another directory.")


def name_full_disk(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Has the error of a full disk say where, if it does not."""
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
        error.filename = os.fspath(path)


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end of the block.

    Raises:
        OSError: it cannot be written; then `path` is as it was, and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        name_full_disk(error, path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)
