"""Saving a model so that its directory is whole or untouched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from .hub.card import NAME as CARD
from .hub.card import is_users_own, write_card
from .hub.upload import push_directory
from .output_files import name_full_disk
from .publish import finish_interrupted, model_files, publish, staging


def check_output_directory(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Whether a model can be saved there; to be asked before the work begins. Writes nothing that stays.

    Where an earlier process was killed while it put a model there that was complete already, that is completed.

    Args:
        path: the directory, which need not exist.
        overwrite: whether a model that is there may be replaced.

    Returns:
        The path.

    Raises:
        ValueError: the path is empty.
        NotADirectoryError: the path, or a parent of it, is a file.
        FileExistsError: the directory holds a model, and `overwrite` is False.
        PermissionError: it cannot be written to.
    """
    check_named(path)
    path = Path(path)
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"Cannot save a model in {path}: {existing} is a file. Choose another directory.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(
            f"Cannot save a model in {path}: {existing} is not writable ({error.strerror}). Choose another one."
        ) from None
    finish_interrupted(path)
    if path.is_dir() and not overwrite and model_files(path):
        raise FileExistsError(
            f"{path} already holds a model ({model_files(path)[0].name}). Choose another directory, or replace it with "
            "overwrite=True (--overwrite)."
        )
    return path


def check_named(path: str | os.PathLike) -> None:
    """Raises ValueError for an empty path (a shell's unset variable), which would be the current directory."""
    if not os.fspath(path):
        raise ValueError("The directory to save the model in has an empty name.")


def check_not_source(path: str | os.PathLike, source: str | os.PathLike) -> None:
    """Raises ValueError where a model would replace the float model that it is made from, which nothing brings back."""
    if os.path.isdir(path) and os.path.isdir(source) and os.path.samefile(path, source):
        raise ValueError(f"{path} holds the float model itself, which is not replaced. Choose another directory.")


def save_model(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | os.PathLike,
    overwrite: bool = False,
    *,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Path:
    """Saves a model and its tokenizer: everything is written beside the directory first, and moved there at the end.

    At any moment, also after a kill, a directory that held a model is the old one or the new one as a whole, or holds
    no config.json and the new one complete in `.optimum_arb-replacing`, which the next save there puts in place (see
    `optimum_arb.publish`).

    Args:
        model: the model.
        tokenizer: its tokenizer or processor, or None.
        path: the directory. Files in it that are no part of a model stay, and so does a README.md that this package did
            not write.
        overwrite: whether a model that is there may be replaced.
        push_to_hub: the name of a model on the Hub, to which all that was saved is uploaded then, in one commit.
        private, revision, token: of the upload, see `optimum_arb.hub.push_directory`.
        kwargs: go to `save_pretrained` (`max_shard_size`, ...).

    Raises:
        OSError: as `check_output_directory`, and what writing raises (a full disk, ...); what was in the directory is
            then untouched. Or as `push_directory`, of the upload: the model is saved then.
    """
    path = Path(path)
    saved = write_model(model, tokenizer, path, overwrite, **kwargs)
    if push_to_hub is not None:
        try:
            push_directory(path, push_to_hub, files=saved, private=private, revision=revision, token=token)
        except OSError as error:
            raise type(error)(
                f"{error} The model is saved in {path}; to try again: optimum-arb push {path} {push_to_hub}"
            ) from error
    return path


def write_model(
    model: PreTrainedModel, tokenizer: Any, path: str | os.PathLike, overwrite: bool = False, **kwargs: Any
) -> list[str]:
    """As `save_model`, without an upload.

    Returns:
        The files that were written, relative to the directory, which may hold others.
    """
    path = check_output_directory(path, overwrite)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging(target) as staged:
        try:
            model.save_pretrained(staged, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
            if (staged / CARD).exists():
                write_card(staged, name=path.absolute().name, tags=getattr(model, "model_tags", None) or ())
            saved = [file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()]
            if is_users_own(target / CARD):
                shutil.copy2(target / CARD, staged / CARD)
        except SafetensorError as error:  # what its writer makes of an error of the system
            raise OSError(f"Cannot save a model in {path}: {error}. What was there is as it was.") from error
        except OSError as error:
            name_full_disk(error, path)
            raise
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o777 & ~umask)  # mkdtemp's own are for this user alone
        publish(staged, target)
    return saved
