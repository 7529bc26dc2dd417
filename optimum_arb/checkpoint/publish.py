"""Putting a finished model in its place, in a way that can be repeated after an interruption."""

from __future__ import annotations

import os
from pathlib import Path

from ..publish import finish_interrupted
from ..publish import publish as put_in_place
from .work import WorkDirectory, file_digest


def publish(staging: Path, output: Path) -> None:
    """Moves the files of a finished model to where it belongs, as `optimum_arb.publish` does it.

    Args:
        staging: where they are.
        output: where they go. Files there that are no part of a model stay.
    """
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    put_in_place(staging, target)


def publish_again(work: WorkDirectory, staging: Path, output: Path) -> None:
    """Completes what an interrupted `publish` began, or does nothing.

    Args:
        work: the run, which says which files there are.
        staging: where they were.
        output: where they go.

    Raises:
        ValueError: they are neither here nor there.
    """
    target = Path(os.path.realpath(output))
    if target.is_dir():
        finish_interrupted(target)
    if not _holds(target, work):
        if not _holds(staging, work):
            raise ValueError(
                f"{staging} and {output} do not hold the model that the interrupted run finished. Delete {work.path} "
                "and begin anew."
            )
        publish(staging, output)


def _holds(directory: Path, work: WorkDirectory) -> bool:
    """Whether the files of the finished model are in a directory."""
    return all(
        (directory / name).is_file() and file_digest(directory / name) == digest
        for name, digest in (work.published or {}).items()
    )
