"""The header of a safetensors file: read with the places of its tensors, and its metadata changed in place.

A file is 8 bytes with the length of the header, the header (JSON, padded with spaces), and the data of the tensors one
after the other. The library writes metadata only with the whole file and tells no places, so both are done here; what
it says about a file's validity is asked first.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# As on the Hub. The header of 100,000 tensors has about 15 MB.
MAX_HEADER = 25_000_000
_PREFIX = 8


@dataclass(frozen=True)
class Placed:
    """A tensor in a file: safetensors dtype name, shape, and its first byte and the one after its last in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def check_header_length(path: str | os.PathLike) -> None:
    """Raises ValueError where a file is none, or its header is longer than it may be, before it is read."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, and a device has no end
        raise ValueError(f"{path} is no file. Save or download the model again.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
    if length > MAX_HEADER:
        raise ValueError(
            f"{path} is no intact safetensors file: its header would have {length:,} bytes, of which the Hub allows "
            f"{MAX_HEADER:,}. Save or download the model again."
        )


def read_header(path: str | os.PathLike) -> tuple[dict[str, Placed], dict[str, str]]:
    """The tensors of a file with their places, in the order of their data, and the file's metadata.

    Raises:
        ValueError: it is not safetensors, or is damaged or cut short.
    """
    check_header_length(path)
    try:
        with safe_open(path, framework="np"):  # checks all shapes, offsets and the length of the file
            pass
        header, start = _parse(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):  # null, which the library takes for none
            raise ValueError("its metadata are no table")
        tensors = {
            key: Placed(entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"]))
            for key, entry in header.items()
        }
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}. Save or download the model again.") from None
    return dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata


def _parse(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """The header's JSON, and where the data begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        return json.loads(file.read(length)), _PREFIX + length


def set_metadata(path: str | os.PathLike, entries: Mapping[str, str]) -> None:
    """Sets entries of a file's metadata; the data of the tensors stay as they are.

    In place where the header, with the padding that it has, leaves room for it; otherwise the file is written anew
    beside the old one and put in its place.

    Args:
        path: a file that is known to be valid.
        entries: name -> value. Those that are no longer than the present ones always find room.

    Raises:
        OSError: the file cannot be written.
    """
    header, start = _parse(path)
    # sorted: the library writes its entries in an order of chance, and the same model is to give the same file
    header["__metadata__"] = dict(sorted({**(header.get("__metadata__") or {}), **entries}.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    room = start - _PREFIX
    if len(text) <= room:
        with open(path, "r+b", buffering=0) as file:
            file.seek(_PREFIX)
            _write(file, text.ljust(room))
        return
    room = -(-len(text) // 8) * 8  # the data stay aligned
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as new, open(path, "rb") as old:
            new.write(room.to_bytes(_PREFIX, "little") + text.ljust(room))
            old.seek(start)
            shutil.copyfileobj(old, new, 1 << 22)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
