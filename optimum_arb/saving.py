"""Saving a model so that its directory is whole or untouched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .hub.card import NAME as CARD
from .hub.card import is_users_own, write_card
from .hub.upload import push_directory
from .stored_report import NAME as REPORT

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


def check_output_directory(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Whether a model can be saved there; to be asked before the work begins. Writes nothing that stays.

    Args:
        path: the directory, which need not exist.
        overwrite: whether a model that is there may be replaced.

    Returns:
        The path.

    Raises:
        NotADirectoryError: the path, or a parent of it, is a file.
        FileExistsError: the directory holds a model, and `overwrite` is False.
        PermissionError: it cannot be written to.
    """
    path = Path(path)
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"Cannot save a model in {path}: {existing} is a file. Choose another directory.")
    if path.is_dir() and not overwrite and _model_files(path):
        raise FileExistsError(
            f"{path} already holds a model ({_model_files(path)[0].name}). Choose another directory, or overwrite it."
        )
    for directory in {existing, path.absolute().parent} if path.exists() else {existing}:
        try:
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise PermissionError(
                f"Cannot save a model in {path}: {directory} is not writable ({error.strerror}). Choose another one."
            ) from None
    return path


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
    """Saves a model and its tokenizer: everything is written beside the directory first and moved there at the end.

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
        OSError: as `check_output_directory`, and what writing raises; what was in the directory is then untouched. Or
            as `push_directory`, of the upload: the model is saved then.
    """
    path = check_output_directory(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model.save_pretrained(temporary, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if (temporary / CARD).exists():
            write_card(temporary, name=path.absolute().name, tags=getattr(model, "model_tags", None) or ())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's own are for this user alone
        saved = [file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file()]
        if not path.exists() or not any(path.iterdir()):
            os.replace(temporary, path)
        else:
            _replace_files(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if push_to_hub is not None:
        try:
            push_directory(path, push_to_hub, files=saved, private=private, revision=revision, token=token)
        except OSError as error:
            raise type(error)(
                f"{error} The model is saved in {path}; to try again: optimum-arb push {path} {push_to_hub}"
            ) from error
    return path


def _model_files(path: Path) -> list[Path]:
    """The files that make a directory one of a model."""
    return sorted(f for f in path.iterdir() if f.name == "config.json" or f.name.endswith(_WEIGHT_SUFFIXES))


def _replace_files(source: Path, target: Path) -> None:
    """Moves every file of `source` to `target`, in place of the model that is there; its config comes last."""
    new = sorted(source.iterdir(), key=lambda f: f.name == "config.json")
    for stale in (*_model_files(target), target / REPORT):
        if stale.name not in {f.name for f in new}:
            stale.unlink(missing_ok=True)
    for file in new:
        if file.name == CARD and is_users_own(target / CARD):
            continue
        if file.is_dir() and (target / file.name).is_dir():
            shutil.rmtree(target / file.name)
        os.replace(file, target / file.name)
