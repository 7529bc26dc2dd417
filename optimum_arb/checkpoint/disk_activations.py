"""The hidden states between two layers in files, for runs whose memory does not hold them."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from pathlib import Path
from typing import IO, Any

import torch

from ..calibration.activations import Activations
from .work import synchronize


class DiskActivations(Activations):
    """As `Activations`, with one batch in memory at a time.

    A generation is a file. A run that was interrupted goes on with the one that the manifest names, which must be on
    the disk before (`synchronize`). No generation is removed while the manifest names it.

    Args:
        directory: where the files are; it is made.
        kept: what `state` was when the run was interrupted.

    Attributes:
        state: which file is current, and what it holds, as JSON; None before the first layer is finished.
    """

    in_memory = False

    def __init__(self, directory: Path, kept: dict[str, Any] | None = None):
        super().__init__()
        self.directory = directory
        self.state: dict[str, Any] | None = None
        self._kept = kept
        self._current: list[dict[str, Any]] = []
        self._next: dict[int, dict[str, Any]] = {}
        self._generation = 0
        self._reader: IO[bytes] | None = None
        self._reading = threading.Lock()
        self._writer: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._current)

    def __getitem__(self, batch: int) -> torch.Tensor:
        assert self._reader is not None
        with self._reading:  # several threads ask, and the file has one position
            return _read(self._reader, self._current[batch])

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        tensor = hidden.detach().to("cpu").contiguous()
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._writer = open(self._path(self._generation + 1), "wb")  # noqa: SIM115 (closed by `advance`)
        data = _bytes(tensor)
        entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        self._next[batch] = {**entry, "start": self._writer.tell(), "crc32": zlib.crc32(data)}
        self._writer.write(data)

    def advance(self, layer: str) -> None:
        if self._writer is None:
            return  # no batch
        self._writer.close()
        self._writer = None
        self._generation += 1
        self._current, self._next = [self._next[batch] for batch in range(len(self._next))], {}
        self._open()
        self.state = {"layer": layer, "generation": self._generation, "batches": self._current}

    def restore(self, layer: str) -> bool:
        kept = self._kept
        if kept is None or kept["layer"] != layer:
            return False
        path = self._path(kept["generation"])
        try:
            with open(path, "rb") as file:
                for entry in kept["batches"]:
                    if zlib.crc32(_bytes(_read(file, entry))) != entry["crc32"]:
                        return False
        except (OSError, ValueError):
            return False  # they are computed again
        self._generation, self._current, self.state = kept["generation"], kept["batches"], kept
        self._open()
        for path in self.directory.glob("*.hidden"):
            if path != self._path(self._generation):
                path.unlink()
        return True

    def synchronize(self, state: dict[str, Any]) -> None:
        """Waits until a generation is on the disk; a thread may, while the next one is written.

        Args:
            state: what the attribute was when this generation was the current one.
        """
        synchronize(self._path(state["generation"]), self.directory)

    def drop_stale(self, state: dict[str, Any]) -> None:
        """Removes the files of the generations before one, which the manifest names now. Later ones may be written
        meanwhile.

        Args:
            state: as for `synchronize`.
        """
        for path in self.directory.glob("*.hidden"):
            if path.name < self._path(state["generation"]).name:
                path.unlink()

    def drop_before(self, layer: str) -> None:
        """As `drop_stale` of the current generation, if that is this layer's: of one that an earlier run finished."""
        if self.state is not None and self.state["layer"] == layer:
            self.drop_stale(self.state)

    def clear(self) -> None:
        for file in (self._reader, self._writer):
            if file is not None:
                file.close()
        self._reader = self._writer = self.state = None
        self._current, self._next = [], {}

    def _open(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = open(self._path(self._generation), "rb", buffering=0)  # noqa: SIM115 (closed by `clear`)

    def _path(self, generation: int) -> Path:
        return self.directory / f"{generation:05}.hidden"


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read(file: IO[bytes], entry: dict[str, Any]) -> torch.Tensor:
    tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    file.seek(entry["start"])
    view = _bytes(tensor)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("The file of the hidden states was cut short.")
        view = view[count:]
    return tensor


def remove_activations(directory: Path) -> None:
    """Removes the files of hidden states, and the directory if nothing else is in it."""
    for path in directory.glob("*.hidden"):
        path.unlink()
    with contextlib.suppress(OSError):
        os.rmdir(directory)
