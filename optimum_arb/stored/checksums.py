"""Checksums of every tensor of a saved model, in the headers of its safetensors files.

One entry of a file's metadata, `optimum_arb_checksums`, holds as JSON

    algorithm      "crc32"
    tensors        8 hexadecimal digits for each tensor of the file, in the order of their sorted names
    model          16 hexadecimal digits of the checksums of all files together, the same in each of them
    quantization   the `quantization_config` that the weights were saved with

The CRC-32 of a tensor is that of `name NUL dtype NUL shape NUL` and of its bytes as they are in the file, so that a
tensor under another's name is found too. It finds every change of up to 32 neighbouring bits, and another one with a
probability of 1 - 2^-32. zlib's runs at about 1.5 GB/s on one core and without the interpreter's lock.

and another one, `optimum_arb_version`, the version that saved the model; neither is there without the other, so that no
flipped bit in a name takes the checksums away.

In the file, because a file is what is copied, uploaded, downloaded and renamed. Tools that do not know the entries keep
them, or drop them with the rest of the metadata when they write a file anew: then there is nothing to compare with.
While a model is being saved the first entry says "unfinished", and is as long as the one that takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..config import ARBConfig
from ..version import __version__
from .header import Placed, read_header, set_metadata

logger = logging.getLogger(__name__)

ENTRY = "optimum_arb_checksums"
VERSION_ENTRY = "optimum_arb_version"
UNFINISHED = "unfinished"
ALGORITHM = "crc32"
# Set to 1, no model's checksums are compared when it loads.
SKIP_VARIABLE = "OPTIMUM_ARB_SKIP_CHECKSUMS"
# What may be different in another run of the same model, or is recorded after it was saved.
_NOT_COMPARED = ("backend", "max_memory", "perplexity", "requires", "verify_checksums")
_CHUNK = 1 << 22
# Bytes that a thread reads at once in one file: enough that starting it does not count.
_RUN = 1 << 25
_THREADS = 8
_AGAIN = "Save or download the model again; ARBConfig(verify_checksums=False) loads it as it is."


@dataclass(frozen=True)
class Verification:
    """What was compared when a model was verified.

    Attributes:
        tensors: number of tensors whose checksums were right; 0 where the files record none.
        nbytes: their bytes.
        seconds: what it took.
    """

    tensors: int
    nbytes: int
    seconds: float


def placeholder(tensors: int, quantization: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file until its checksums are known.

    Args:
        tensors: how many tensors the file may get; with more it will be written a second time.
        quantization: the `quantization_config` of the model.
    """
    whole = json.dumps(_entry("0" * (8 * tensors), "0" * 16, quantization))
    room = len(json.dumps(whole)) + 64  # as a string of the header, its quotes count twice
    return {ENTRY: UNFINISHED.ljust(room), VERSION_ENTRY: __version__}


def seal(files: Iterable[str | os.PathLike], quantization: Mapping[str, Any]) -> None:
    """Writes the checksums of a saved model's tensors into its files.

    Args:
        files: all its safetensors files.
        quantization: the `quantization_config` in its config.json.

    Raises:
        ValueError: a file is damaged.
        OSError: a file cannot be read or written.
    """
    sums = {os.fspath(path): tensor_checksums(path) for path in files}
    model = _model_digest(sums)
    for path, found in sums.items():
        table = "".join(found[key] for key in sorted(found))
        set_metadata(path, {ENTRY: json.dumps(_entry(table, model, quantization)), VERSION_ENTRY: __version__})


def verify(files: Iterable[str | os.PathLike], quantization: Mapping[str, Any] | None = None) -> Verification | None:
    """Compares the tensors of a saved model with the checksums that its files record.

    Args:
        files: all its safetensors files.
        quantization: the `quantization_config` of its config.json, which is compared with what the files record; None
            leaves that out.

    Returns:
        What was compared, or None where the files record no checksums.

    Raises:
        ValueError: a tensor is another than was saved; the files are not those of one saved model, or its saving was
            interrupted; the quantization_config is another than the one that the weights were saved with.
    """
    began = time.perf_counter()
    paths = [os.fspath(path) for path in files]
    headers = {path: read_header(path) for path in paths}
    entries = {path: metadata.get(ENTRY) for path, (_, metadata) in headers.items()}
    for path, text in entries.items():
        if (text is None) != (VERSION_ENTRY not in headers[path][1]):
            raise ValueError(f"{path}: the checksums in its header are damaged. {_AGAIN}")
        if text is not None and text.startswith(UNFINISHED):
            raise ValueError(f"{path} is not finished: saving it was interrupted. Save or download the model again.")
    if all(text is None for text in entries.values()):
        return None
    recorded = {path: _parsed(path, text, headers[path][0]) for path, text in entries.items()}
    first = next(iter(recorded))
    stated = {path: {key: entry["table"][key] for key in headers[path][0]} for path, entry in recorded.items()}
    model = _model_digest(stated)
    for path, entry in recorded.items():
        if entry["model"] != model:
            raise ValueError(
                f"{path} and {first} are not the files of one saved model, or one of its files is missing. {_AGAIN}"
                if len(recorded) > 1
                else f"{path}: the checksums in its header were changed, or other files belong to it. {_AGAIN}"
            )
    if quantization is not None:
        _compare_configuration(first, recorded[first]["quantization"], quantization)
    nbytes = 0
    for path, (tensors, _) in headers.items():
        found = _checksums(path, tensors)
        nbytes += sum(tensor.stop - tensor.start for tensor in tensors.values())
        for key, value in found.items():
            if value != stated[path][key]:
                raise ValueError(
                    f"{_module(key)}: the tensor {key!r} in {path} is not what was saved: its checksum is {value}, "
                    f"that of the saved one was {stated[path][key]}. {_AGAIN}"
                )
    return Verification(sum(map(len, stated.values())), nbytes, time.perf_counter() - began)


def tensor_checksums(path: str | os.PathLike) -> dict[str, str]:
    """Name of each tensor of a file -> 8 hexadecimal digits of its checksum.

    Raises:
        ValueError: the file is not safetensors, or is damaged.
    """
    return _checksums(path, read_header(path)[0])


def skipped(verify_checksums: bool) -> bool:
    """Whether checksums are not compared: as the configuration or the environment says."""
    return not verify_checksums or os.environ.get(SKIP_VARIABLE, "0") not in ("", "0")


def _checksums(path: str | os.PathLike, tensors: Mapping[str, Placed]) -> dict[str, str]:
    runs: list[list[tuple[str, Placed]]] = []
    size = _RUN
    for item in tensors.items():
        if size >= _RUN:
            runs.append([])
            size = 0
        runs[-1].append(item)
        size += item[1].stop - item[1].start
    if len(runs) < 2:
        return {key: value for run in runs for key, value in _run(path, run)}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(runs))) as pool:
        return {key: value for found in pool.map(lambda run: _run(path, run), runs) for key, value in found}


def _run(path: str | os.PathLike, tensors: list[tuple[str, Placed]]) -> list[tuple[str, str]]:
    """The checksums of neighbouring tensors of a file. Read and not mapped: a file cut meanwhile must not kill."""
    result = []
    buffer = memoryview(bytearray(min(_CHUNK, max((t.stop - t.start for _, t in tensors), default=0))))
    with open(path, "rb", buffering=0) as file:
        for key, tensor in tensors:
            shape = ",".join(map(str, tensor.shape))
            value = zlib.crc32(f"{key}\0{tensor.dtype}\0{shape}\0".encode())
            file.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    raise ValueError(f"{os.fspath(path)} was cut short while it was read. {_AGAIN}")
                value = zlib.crc32(buffer[:count], value)
                left -= count
            result.append((key, f"{value:08x}"))
    return result


def _model_digest(sums: Mapping[str, Mapping[str, str]]) -> str:
    """Of the checksums of all tensors, whatever the files are called and however they are split."""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in sorted((key, value) for found in sums.values() for key, value in found.items()):
        digest.update(f"{key}\0{value}\n".encode())
    return digest.hexdigest()


def _entry(table: str, model: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in quantization.items() if key not in _NOT_COMPARED}
    return {"algorithm": ALGORITHM, "tensors": table, "model": model, "quantization": kept}


def _parsed(path: str, text: str | None, tensors: Mapping[str, Placed]) -> dict[str, Any]:
    """The entry of a file, with the checksum of each tensor as `table`."""
    if text is None:
        raise ValueError(
            f"{path} records no checksums, which other files of the model do: they were not saved together. {_AGAIN}"
        )
    try:
        entry = json.loads(text)
        algorithm, table = str(entry["algorithm"]), str(entry["tensors"])
        model, quantization = str(entry["model"]), dict(entry["quantization"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: the checksums in its header are damaged. {_AGAIN}") from None
    if algorithm != ALGORITHM:
        raise ValueError(
            f"{path}: its checksums are of the kind {algorithm!r}, this version knows {ALGORITHM!r}. Upgrade "
            "optimum-arb; ARBConfig(verify_checksums=False) loads the model as it is."
        )
    if len(table) != 8 * len(tensors):
        raise ValueError(
            f"{path}: its header records {len(table) // 8} checksums for {len(tensors)} tensors. One of them was "
            f"added, dropped or renamed. {_AGAIN}"
        )
    sums = {key: table[8 * index : 8 * index + 8] for index, key in enumerate(sorted(tensors))}
    return {"table": sums, "model": model, "quantization": quantization}


def _compare_configuration(path: str, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Whether weights belong to a configuration. A key that a later version added and the weights lack is no change."""
    defaults = ARBConfig().to_dict()
    present = json.loads(json.dumps(present))
    for key in sorted({*recorded, *present} - set(_NOT_COMPARED)):
        saved = recorded.get(key, defaults.get(key))
        if present.get(key, defaults.get(key)) != saved:
            raise ValueError(
                f"The quantization_config in config.json says {key}={present.get(key)!r}, but the weights in {path} "
                f"were saved with {saved!r}: one of the two was changed, or they belong to different models. {_AGAIN}"
            )


def _module(key: str) -> str:
    stem, _, name = key.rpartition(".")
    return stem if stem and (name == "bias" or name.startswith("weight")) else key
