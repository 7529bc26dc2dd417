"""Whether a file can be written, asked before the work that it is to hold."""

from __future__ import annotations

import os
from pathlib import Path


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
