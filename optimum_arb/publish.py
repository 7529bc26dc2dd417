"""A saved model into its place, in one step: whoever looks sees the old model or the new one, and never some of both.

A model is saved to a directory beside its place, on the same disk. From there

- where there is nothing yet, or an empty directory, it is renamed;
- where there is a model and nothing else, the two directories are exchanged, by Linux's renameat2;
- where there are other files too, which stay, or where directories cannot be exchanged (other systems, some network
  disks, a mount point), it becomes the journal `.optimum_arb-replacing` in the directory: from then on the new model is
  complete there. The old config.json goes first and the new one comes last, so that what is in between is not a model
  for any reader. `finish_interrupted` completes what was cut short; the next save calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from .stored.report import NAME as REPORT

try:
    import fcntl
except ImportError:  # Windows: no directory is locked there
    fcntl = None  # type: ignore[assignment]

JOURNAL = ".optimum_arb-replacing"
_LIST = ".optimum_arb-files"
_CONFIG = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What says that these two directories, or any on this disk, cannot be exchanged.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES)


def model_files(path: Path) -> list[Path]:
    """The files that make a directory one of a model."""
    return sorted(f for f in path.iterdir() if f.name == _CONFIG or f.name.endswith(_WEIGHT_SUFFIXES))


def nothing_beside(path: Path) -> bool:
    """Whether what is to be renamed into a directory must be made in it: it is a disk of its own, or its parent cannot
    be written to.

    Args:
        path: the directory, with all links resolved.
    """
    return path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """An empty directory from which `publish` can put a model in place, removed at the end if it still is there.

    What earlier processes left of theirs when they were killed is removed first.

    Args:
        path: the place of the model, with all links resolved.

    Raises:
        OSError: it cannot be made.
    """
    inside = nothing_beside(path)
    folder, prefix = (path, ".optimum_arb-saving-") if inside else (path.parent, f".{path.name}-saving-")
    with contextlib.ExitStack() as held:
        with _lock(folder, wait=True):  # so that nobody takes the new directory for one that was left
            for left in folder.glob(f"{glob.escape(prefix)}*"):
                with _lock(left, wait=False) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            held.callback(shutil.rmtree, temporary, ignore_errors=True)
            held.enter_context(_lock(temporary, wait=False))
        yield temporary


def publish(staged: Path, target: Path, stale: Collection[str] | None = None) -> None:
    """Puts a saved model in place of whatever model is there.

    Args:
        staged: the directory that holds it, from `staging`. It is gone afterwards, or holds the old model.
        target: the place, with all links resolved. Files there that are no part of a model stay.
        stale: names of the files there that the new model does away with, besides those that it replaces; None is
            every file of `model_files`.

    Raises:
        OSError: it cannot be put there; the old model is whole, or, once the new one began to take its place, the new
            one is complete in the journal.
    """
    flush(staged)
    if not target.exists():
        os.replace(staged, target)
        _flush_directory(target.parent)
        return
    with _lock(target, wait=True):
        finish_interrupted(target)
        new = {entry.name for entry in staged.iterdir()}
        # a report of other weights must not stay, and alone makes no model
        of_model = {file.name for file in model_files(target)} | {REPORT}
        gone = (of_model if stale is None else {*stale, REPORT}) - new
        kept = {entry.name for entry in target.iterdir()} - new - gone - {staged.name}
        if not kept and staged.parent == target.parent and _exchanged(staged, target):
            _flush_directory(target.parent)
            return
        (staged / _LIST).write_text(json.dumps(sorted(gone)))
        flush(staged)
        os.replace(staged, target / JOURNAL)
        _flush_directory(target)
        finish_interrupted(target)


def finish_interrupted(target: Path) -> bool:
    """Completes the replacement of a model that was interrupted when the new one was complete already.

    Args:
        target: the directory of the model.

    Returns:
        Whether there was one.

    Raises:
        OSError: the files cannot be moved; it can be tried again.
    """
    journal = target / JOURNAL
    if not journal.is_dir():
        return False
    if (journal / _LIST).exists():
        if (journal / _CONFIG).exists():
            (target / _CONFIG).unlink(missing_ok=True)
        for name in json.loads((journal / _LIST).read_text()):
            (target / name).unlink(missing_ok=True)
        for file in sorted(journal.iterdir(), key=lambda file: file.name == _CONFIG):
            if file.name == _LIST:
                continue
            place = target / file.name
            if file.is_dir() and place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            os.replace(file, place)
        (journal / _LIST).unlink()
        _flush_directory(target)
    shutil.rmtree(journal)
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two directories; False where that is not possible here."""
    with contextlib.suppress(OSError):
        shutil.copystat(other, one)
        os.chown(one, other.stat().st_uid, other.stat().st_gid)
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    places = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, places[0], _AT_FDCWD, places[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


@contextlib.contextmanager
def _lock(directory: Path, wait: bool) -> Iterator[bool]:
    """Whether no other process works in a directory; until the end of the block, none that asks begins to.

    Where directories cannot be locked (Windows, some network disks) nobody waits, and nothing counts as left behind.
    """
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = fcntl is not None
        except OSError:
            free = False
        yield free
    finally:
        os.close(handle)


def flush(directory: Path) -> None:
    """Waits until all files of a directory are on the disk: a crash of the machine must not leave an empty file."""
    for folder, _, files in os.walk(directory):
        for name in files:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _flush_directory(Path(folder))


def _flush_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # Windows opens no directory, some disks flush none
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
