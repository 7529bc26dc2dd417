"""Changes to the bytes of safetensors files, whatever they mean."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from .files import edited_bytes, header_bytes, weights_file


def flip_data_bit(folder: Path, others: Path, rng: random.Random) -> str:
    path = weights_file(folder, rng)
    with edited_bytes(path) as content:
        place = rng.randrange(header_bytes(path), len(content))
        bit = rng.randrange(8)
        content[place] ^= 1 << bit
    return f"{path.name}: bit {bit} of byte {place}"


def flip_header_bit(folder: Path, others: Path, rng: random.Random) -> str:
    path = weights_file(folder, rng)
    with edited_bytes(path) as content:
        place = rng.randrange(min(header_bytes(path), len(content)))
        content[place] ^= 1 << rng.randrange(8)
    return f"{path.name}: byte {place}"


def overwrite_bytes(folder: Path, others: Path, rng: random.Random) -> str:
    path = weights_file(folder, rng)
    with edited_bytes(path) as content:
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.choice((1, 2, 16, 512, 4096)))
        before = content[start:stop]
        content[start:stop] = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))
        same = before == content[start:stop]
    return f"{path.name}: bytes {start} to {stop}" + (", as they were" if same else "")


def cut_file(folder: Path, others: Path, rng: random.Random) -> str:
    path = weights_file(folder, rng)
    with edited_bytes(path) as content:
        length = rng.choice((rng.randrange(len(content)), rng.randrange(min(64, len(content))), len(content) - 1))
        del content[length:]
    return f"{path.name}: {length} bytes are left"


def lengthen_file(folder: Path, others: Path, rng: random.Random) -> str:
    path = weights_file(folder, rng)
    more = rng.choice((1, 8, 4096))
    with edited_bytes(path) as content:
        content += rng.randbytes(more)
    return f"{path.name}: {more} bytes more"


def header_length(folder: Path, others: Path, rng: random.Random) -> str:
    path = weights_file(folder, rng)
    value = rng.choice((0, 1, 7, 2**62, 2**63, 2**64 - 1, 25_000_001, 100_000_000, rng.randrange(2**16)))
    with edited_bytes(path) as content:
        content[:8] = struct.pack("<Q", value)
    return f"{path.name}: a header of {value} bytes"
