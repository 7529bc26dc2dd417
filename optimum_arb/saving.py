"""Saving a model so that its directory is whole or untouched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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
    model: PreTrainedModel, tokenizer: Any, path: str | os.PathLike, overwrite: bool = False, **kwargs: Any
) -> Path:
    """Saves a model and its tokenizer: everything is written beside the directory first and moved there at the end.

    Args:
        model: the model.
        tokenizer: its tokenizer or processor, or None.
        path: the directory. Files in it that are no part of a model stay.
        overwrite: whether a model that is there may be replaced.
        kwargs: go to `save_pretrained` (`max_shard_size`, ...).

    Raises:
        OSError: as `check_output_directory`, and what writing raises; what was in the directory is then untouched.
    """
    path = check_output_directory(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model.save_pretrained(temporary, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's own are for this user alone
        if not path.exists() or not any(path.iterdir()):
            os.replace(temporary, path)
        else:
            _replace_files(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _model_files(path: Path) -> list[Path]:
    """The files that make a directory one of a model."""
    return sorted(f for f in path.iterdir() if f.name == "config.json" or f.name.endswith(_WEIGHT_SUFFIXES))


def _replace_files(source: Path, target: Path) -> None:
    """Moves every file of `source` to `target`, in place of the model that is there; its config comes last."""
    new = sorted(source.iterdir(), key=lambda f: f.name == "config.json")
    for stale in _model_files(target):
        if stale.name not in {f.name for f in new}:
            stale.unlink()
    for file in new:
        if file.is_dir() and (target / file.name).is_dir():
            shutil.rmtree(target / file.name)
        os.replace(file, target / file.name)
