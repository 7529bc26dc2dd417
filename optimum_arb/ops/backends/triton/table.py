"""Which kernel computes a product, and how it is cut: looked up, never measured while a user waits.

The package brings tables of the GPUs that it was tuned on (`tables/`); `optimum-cli arb tune` writes one for the
user's own, which goes before them. A shape that is in no table takes the entry of the nearest shape of the same planes
and tokens; where a GPU has none for a kernel, that of one of its compute capability serves, if there is one.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .launch import capability

# Numbers of tokens that are tuned; a number between two of them takes the larger one's entry.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FEW_TOKENS = 4  # up to which the one-bit kernel computes
TABLE_VERSION = 3
# The table of GPUs of a compute capability that have none of their own: an H100 runs the kernels of an H200.
OF_CAPABILITY = {(9, 0): "NVIDIA_H200.json"}


@dataclass(frozen=True)
class Entry:
    """One tuned product.

    Attributes:
        out_features: N.
        in_features: K.
        planes: stored sign planes.
        tokens: M, one of `TOKENS`.
        kernel: "one_bit", "half_bits" (beside the entry of another kernel, for weights that are prepacked), or a kernel
            of `GemmConfig`; of up to `FEW_TOKENS` tokens "one_bit" where that runs.
        config: the fields of `DecodeConfig`, `HalfConfig` or `GemmConfig`.
        microseconds: what it took when it was tuned.
    """

    out_features: int
    in_features: int
    planes: int
    tokens: int
    kernel: str
    config: dict[str, Any]
    microseconds: float = math.nan


def bucket(tokens: int) -> int:
    """The tuned number of tokens that stands for this one."""
    return TOKENS[min(bisect_left(TOKENS, tokens), len(TOKENS) - 1)]


def device_file(device: torch.device | str) -> str:
    """The file name of a device's table."""
    name = device if isinstance(device, str) else torch.cuda.get_device_name(device)
    return "".join(c if c.isalnum() else "_" for c in name) + ".json"


def user_directory() -> Path:
    """Where `tune` writes: `$OPTIMUM_ARB_CACHE`, or `optimum_arb` in the user's cache directory."""
    if chosen := os.environ.get("OPTIMUM_ARB_CACHE"):
        return Path(chosen) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimum_arb" / "kernels"


def read(path: Path) -> list[Entry]:
    """The entries of a table; none where the file does not exist.

    Raises:
        ValueError: the file is no table, or one of another version.
    """
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        if found["version"] != TABLE_VERSION:
            return []  # of another release: as good as none
        return [Entry(**entry) for entry in found["entries"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a table of kernels ({error}): delete it, or write it again with `optimum-cli arb tune`."
        ) from error


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in entries)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"version": {TABLE_VERSION}, "entries": [\n  {lines}\n]}}\n')
    temporary.replace(path)


def key(entry: Entry) -> tuple[int, int, int, int, bool]:
    """What a table has one entry of."""
    return entry.out_features, entry.in_features, entry.planes, entry.tokens, entry.kernel == "half_bits"


@cache
def _entries(name: str) -> tuple[Entry, ...]:
    shipped = Path(__file__).parent / "tables" / name
    return tuple({key(e): e for path in (shipped, user_directory() / name) for e in read(path)}.values())


@cache
def lookup(
    device: torch.device, out_features: int, in_features: int, planes: int, tokens: int, half_bits: bool = False
) -> Entry | None:
    """The entry of the nearest product on this device, by planes, then tokens, then shape; None where there is none.

    Args:
        device: a CUDA device.
        out_features: N.
        in_features: K.
        planes: stored sign planes.
        tokens: M, of `TOKENS`.
        half_bits: look for an entry of this kernel and these tokens alone.
    """
    few: list[Entry] = []
    for name in (device_file(device), OF_CAPABILITY.get(capability(device))):
        entries = () if few or name is None else _entries(name)
        if half_bits:
            few += [e for e in entries if e.kernel == "half_bits" and e.tokens == tokens]
        else:
            gemm = [e for e in entries if e.kernel != "half_bits"]
            few += [e for e in gemm if (e.tokens <= FEW_TOKENS) == (tokens <= FEW_TOKENS)]
    few = [e for e in few if e.planes == planes] or [e for e in few if e.planes == max(x.planes for x in few)]
    if not few:
        return None
    nearest = min({e.tokens for e in few}, key=lambda size: (abs(math.log2(size / tokens)), -size))
    same = [e for e in few if e.tokens == nearest]

    def distance(entry: Entry) -> float:
        return abs(math.log2(entry.out_features / out_features)) + abs(math.log2(entry.in_features / in_features))

    return min(same, key=distance)
