"""SHA-256 of a checkpoint's parts and files, computed beside the walk."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..reproduce import content_digest, recorded_digest
from .source import CheckpointSource

_CHUNK = 1 << 22


class Ended(Exception):
    """The run has ended, and nobody asks for a digest any more."""


class SourceDigests:
    """What the parts of a checkpoint are, by which a resumed run knows them, and its files, which the report names.

    One thread reads them in the order in which they are asked for. So a part that is asked for while the layer before
    it is at work lies in the page cache when it is loaded. Behind a part the thread goes on with the files, as far as
    the walk has come, so that both have been read when it ends: reading the files then took 1 s for each 1 GB of the
    largest, 10 s for a Llama-2-7B as it is distributed.

    Args:
        source: the checkpoint.
        files: its files; none where nobody will ask for theirs.
    """

    def __init__(self, source: CheckpointSource, files: Iterable[str | os.PathLike] = ()):
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="optimum_arb-digests")
        self._parts: dict[str, tuple[Any, Future[str]]] = {}  # what its files were when it was asked for
        self._ended = False
        found = sorted({os.path.realpath(file) for file in files if recorded_digest(Path(file)) is None})
        self._left = [(file, os.path.getsize(file)) for file in found]
        self._bytes = sum(size for _, size in self._left)
        self._read = 0
        self._done: dict[str, str] = {}
        self._current: tuple[str, Any, Any] | None = None  # a file, opened, and the digest of what was read of it
        self._ahead: Future[None] | None = None
        self._finishing = threading.Lock()

    def begin(self, part: str) -> None:
        """Reads a part, unless that was asked for before and its files are the same. To be asked again when it is
        loaded: it is read ahead by minutes, and what is loaded counts."""
        state = self._source.state(part)
        if part not in self._parts or self._parts[part][0] != state:
            self._parts[part] = state, self._thread.submit(self._source.fingerprint, part, self._check)

    def of(self, part: str) -> str:
        """Of the names and bytes of a part's tensors.

        Raises:
            ValueError: a file was cut short.
            OSError: a file cannot be read.
        """
        if part not in self._parts:
            self.begin(part)
        return self._parts[part][1].result()

    def advance(self, share: float) -> None:
        """Goes on with the files, up to this share of their bytes. Left out while the thread has not come to the last
        share yet: no part is to wait for it, and `of_file` reads what is left."""
        if self._ahead is None or self._ahead.done():
            self._ahead = self._thread.submit(self._read_files, share)

    def of_file(self, path: Path) -> str:
        """Of the content of a file; for several files, several threads may ask at once.

        Raises:
            OSError: a file cannot be read.
        """
        if self._ahead is not None:
            self._ahead.result()
        file = os.path.realpath(path)
        with self._finishing:
            while self._current is not None and self._current[0] == file:
                self._step()
        return self._done[file] if file in self._done else content_digest(path)

    def close(self) -> None:
        """Ends the thread."""
        self._ended = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def _read_files(self, share: float) -> None:
        while self._read < share * self._bytes and (self._current is not None or self._left):
            self._check()
            if self._current is None:
                file = self._left.pop(0)[0]
                self._current = file, open(file, "rb", buffering=0), hashlib.sha256()  # noqa: SIM115 (`_step` closes it)
            self._step()

    def _step(self) -> None:
        assert self._current is not None
        file, opened, digest = self._current
        if chunk := opened.read(_CHUNK):
            digest.update(chunk)
            self._read += len(chunk)
        else:
            opened.close()
            self._done[file] = digest.hexdigest()
            self._current = None

    def _check(self) -> None:
        if self._ended:
            raise Ended
