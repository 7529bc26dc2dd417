"""Putting a finished model in its place, in one step or in such that can be repeated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..hub.card import NAME as CARD
from ..hub.card import is_users_own
from ..publish import model_files
from ..stored_report import NAME as REPORT
from .work import WorkDirectory, file_digest, synchronize


def publish(work: WorkDirectory, staging: Path, output: Path) -> None:
    """Moves the files of a finished model to where it belongs.

    Into a place where there is nothing, the whole directory is renamed. A model that is there loses its config.json
    first, so that at no instant the directory looks like a model without being one, and the new config.json comes last.
    Done again after an interruption, it moves what is left.

    Args:
        work: the run, which says which files there are.
        staging: where they are.
        output: where they go. Files there that are no part of a model stay, and so does a README.md of the user's own.
    """
    assert work.published is not None
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    if staging.is_dir() and not _there(output):
        if output.exists():
            output.rmdir()
        os.rename(staging, output)
        synchronize(output.parent)
        return
    waiting = {file.name for file in staging.iterdir()} if staging.is_dir() else set()
    if "config.json" in waiting:
        (output / "config.json").unlink(missing_ok=True)
        synchronize(output)
    for stale in (*model_files(output), output / REPORT):
        if stale.name not in work.published:
            stale.unlink(missing_ok=True)
    for name in sorted(waiting, key=lambda name: name == "config.json"):
        if name == CARD and is_users_own(output / CARD):
            continue
        if name == "config.json":
            synchronize(output)
        if (staging / name).is_dir() and (output / name).is_dir():
            shutil.rmtree(output / name)
        os.replace(staging / name, output / name)
    synchronize(output)
    _check(work, output)


def _there(output: Path) -> bool:
    return output.is_dir() and any(output.iterdir())


def _check(work: WorkDirectory, output: Path) -> None:
    """Whether the files that were moved are those that were written."""
    for name, digest in (work.published or {}).items():
        file = output / name
        if name != CARD and (not file.is_file() or file_digest(file) != digest):
            raise ValueError(f"{file} is not what the interrupted run wrote there. Delete {work.path} and begin anew.")
