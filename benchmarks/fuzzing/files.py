"""The files of a saved model as they are changed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Raw:
    """A safetensors file in its parts: the header as pairs, in which a key may come twice, and the data."""

    def __init__(self, path: Path):
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        self.path = path
        self.header: list[tuple[str, Any]] = list(json.loads(content[8 : 8 + length]).items())
        self.data = bytearray(content[8 + length :])

    def tensors(self) -> list[int]:
        """The places in `header` of the tensors."""
        return [index for index, (key, _) in enumerate(self.header) if key != "__metadata__"]

    def write(self, text: str | None = None) -> None:
        if text is None:
            text = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in self.header) + "}"
        encoded = text.encode("utf-8", "surrogatepass")
        encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
        self.path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + self.data)

    def pack(self) -> None:
        """Puts the data of the tensors that are left one after the other."""
        data = bytearray()
        for index in self.tensors():
            entry = self.header[index][1]
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = [len(data), len(data) + stop - start]
            data += self.data[start:stop]
        self.data = data


def weights_file(folder: Path, rng: random.Random) -> Path:
    """Some safetensors file of a model."""
    return rng.choice(sorted(folder.glob("*.safetensors")))


def header_bytes(path: Path) -> int:
    """How many bytes of a safetensors file are before its data, by its own account."""
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


@contextmanager
def edited_bytes(path: Path) -> Iterator[bytearray]:
    """The content of a file, which is written as it is then."""
    content = bytearray(path.read_bytes())
    yield content
    path.write_bytes(content)


@contextmanager
def edited_json(path: Path) -> Iterator[Any]:
    """The value of a JSON file, which is written as it is then."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))
