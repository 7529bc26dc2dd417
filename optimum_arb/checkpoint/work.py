"""The work directory of a run: its finished pieces, and a manifest of what they are and what they were made of.

A piece is written under a temporary name, synchronized, renamed, and only then named in the manifest, which is written
in the same way. So whatever the manifest names is whole, at whatever instant the run ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from .source import read_range

MANIFEST = "manifest.json"
LOCK = "lock"
VERSION = 2
_RUN = 1 << 26
_THREADS = 8


class WorkDirectory:
    """What a run has finished, and what it must find unchanged to go on.

    Args:
        path: the directory; it is made by `begin`.

    Attributes:
        pieces: part of the model -> its entry in the manifest: file, digest, records.
        sources: part of the model -> SHA-256 of its float tensors.
        activations: what was kept of the hidden states behind the last finished layer, or None.
        published: file -> digest (`file_digest`) of the finished model, once it is whole and before it is in its place.
    """

    def __init__(self, path: Path):
        self.path = path
        self.identity: dict[str, Any] = {}
        self.pieces: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, str] = {}
        self.activations: dict[str, Any] | None = None
        self.published: dict[str, str] | None = None
        self._lock: FileLock | None = None

    @property
    def exists(self) -> bool:
        """Whether a run has left something here."""
        return (self.path / MANIFEST).is_file()

    @property
    def locked(self) -> bool:
        """Whether this process is at work here."""
        return self._lock is not None

    def lock(self) -> None:
        """Keeps other processes out until `unlock`, or the end of this one.

        Raises:
            RuntimeError: another process is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"Another process is binarizing into {self.path}: wait for it, or end it.") from None
        self._lock = lock

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Begins anew: nothing is finished.

        Args:
            identity: everything that the result depends on, as JSON.
        """
        self._empty()
        self.identity = json.loads(json.dumps(identity))
        self._write_manifest()

    def resume(self, identity: Mapping[str, Any]) -> None:
        """Reads what is finished and compares what it was made of.

        Args:
            identity: as for `begin`, of this run.

        Raises:
            ValueError: something differs, which the message names; or a finished piece is damaged.
        """
        self.read()
        now = json.loads(json.dumps(identity))
        different = [
            f"{key} was {_shown(before)} and is {_shown(after)} now"
            for key, before, after in _differences(self.identity, now)
        ]
        if different:
            raise ValueError(
                f"The interrupted run in {self.path} cannot be continued: {'; '.join(different)}. Go back to what it "
                "was, or begin anew without resume (and delete that directory)."
            )
        for part in list(self.pieces):
            self._check_piece(part)

    def read(self) -> None:
        """Reads the manifest."""
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["version"]
            if version == VERSION:
                self.identity = manifest["identity"]
                self.pieces = manifest["pieces"]
                self.sources = manifest["sources"]
                self.activations = manifest["activations"]
                self.published = manifest["published"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of an interrupted run ({error}). Delete {self.path}.") from None
        if version != VERSION:
            raise ValueError(f"{path} was written by another version of optimum_arb. Delete {self.path}.")

    def clear(self) -> None:
        """Removes the directory with all that is in it."""
        self._empty()
        if self.path.exists():
            shutil.rmtree(self.path)

    def _empty(self) -> None:
        """Removes everything but the lock; the manifest last, so that what is left names nothing that is gone."""
        self.identity, self.pieces, self.sources = {}, {}, {}
        self.activations = self.published = None
        found = list(self.path.iterdir()) if self.path.exists() else []
        for entry in sorted(found, key=lambda entry: entry.name == MANIFEST):
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write_piece(
        self,
        part: str,
        tensors: Mapping[str, torch.Tensor],
        records: Mapping[str, Any],
        sources: Mapping[str, str],
        activations: dict[str, Any] | None = None,
    ) -> None:
        """Keeps a finished part of the model.

        Args:
            part: its name.
            tensors: by their names in the model.
            records: of its binarized modules, as JSON.
            sources: part -> SHA-256 of what it was made of.
            activations: what was kept of its outputs.

        Raises:
            OSError: it cannot be written; what was finished before is as it was.
        """
        name = f"{re.sub(r'[^0-9A-Za-z.]+', '-', part) or 'outside'}.safetensors"
        temporary = self.path / f"{name}.tmp"
        try:
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # what its writer makes of an error of the system
            raise OSError(f"Cannot keep {part or 'what is outside of the layers'} in {temporary}: {error}.") from error
        digest = file_digest(temporary)
        synchronize(temporary)
        os.replace(temporary, self.path / name)
        synchronize(self.path)
        before = self.pieces, self.sources, self.activations
        self.pieces = {**self.pieces, part: {"file": name, "digest": digest, "records": dict(records)}}
        self.sources = {**self.sources, **sources}
        self.activations = activations
        try:
            self._write_manifest()
        except BaseException:
            self.pieces, self.sources, self.activations = before
            raise

    def publish(self, files: Mapping[str, str]) -> None:
        """Notes that the model is whole.

        Args:
            files: name -> its digest (`file_digest`).
        """
        self.published = dict(files)
        self._write_manifest()

    def keep(self, parts: Collection[str]) -> None:
        """Forgets the finished parts that are not among these: another rank of the run has not finished them."""
        if any(part not in parts for part in self.pieces):
            self.pieces = {part: piece for part, piece in self.pieces.items() if part in parts}
            self._write_manifest()

    def piece(self, part: str) -> Path:
        """The file of a finished part."""
        return self.path / self.pieces[part]["file"]

    def _check_piece(self, part: str) -> None:
        path = self.piece(part)
        if not path.is_file() or file_digest(path) != self.pieces[part]["digest"]:
            raise ValueError(
                f"{path}, which an interrupted run finished, is damaged or gone. Delete {self.path} and begin anew."
            )

    def _write_manifest(self) -> None:
        text = json.dumps(
            {
                "version": VERSION,
                "identity": self.identity,
                "sources": self.sources,
                "activations": self.activations,
                "published": self.published,
                "pieces": self.pieces,
            },
            indent=1,
        )
        temporary = self.path / f"{MANIFEST}.tmp"
        temporary.write_text(text, encoding="utf-8")
        synchronize(temporary)
        os.replace(temporary, self.path / MANIFEST)
        synchronize(self.path)


def _differences(before: Any, after: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [
            found
            for name in keys
            for found in _differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == after else [(key, before, after)]


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of the SHA-256s of a file's runs of 64 MB, of which several threads read one each: one thread hashes some
    1 GB a second, and the files of a binarized 70B have 11."""
    size = os.path.getsize(path)

    def of_run(start: int) -> bytes:
        digest = hashlib.sha256()
        for chunk in read_range(Path(path), start, min(start + _RUN, size)):
            digest.update(chunk)
        return digest.digest()

    starts = range(0, size, _RUN)
    if len(starts) < 2:
        found = map(of_run, starts)
        return hashlib.sha256(b"".join(found)).hexdigest()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(starts))) as pool:
        return hashlib.sha256(b"".join(pool.map(of_run, starts))).hexdigest()


def synchronize(*paths: str | os.PathLike) -> None:
    """Waits until files, or the names in directories, are on the disk."""
    for path in paths:
        if os.name == "nt" and os.path.isdir(path):
            continue  # Windows opens no directories
        handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
