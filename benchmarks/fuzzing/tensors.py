"""Changes to the tensors of safetensors files: their names, shapes, dtypes, places and values, and their checksums."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

from optimum_arb.stored.checksums import ENTRY

from .files import Raw, weights_file

WIDTHS = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "I64": 8}


def drop_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    key, _ = raw.header.pop(rng.choice(raw.tensors()))
    raw.pack()
    raw.write()
    return key


def rename_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    index = rng.choice(raw.tensors())
    key, entry = raw.header[index]
    stem, _, last = key.rpartition(".")
    new = rng.choice(
        (
            key + "x",
            key.upper(),
            last,
            "",
            f"model.{key}",
            key.replace("0", "1"),
            key.replace("0", "999999999999"),
            f"{stem}.weight_row_scale",
            f"{stem}.weight_salient_columns",
            f"{stem}.weight_zero_point",
            f"../{key}",
            key * 1000,
            raw.header[rng.choice(raw.tensors())][0],
        )
    )
    raw.header[index] = (new, entry)
    raw.write()
    return f"{key} -> {new[:80]}"


def swap_tensors(folder: Path, others: Path, rng: random.Random) -> str | None:
    """The data of two tensors of the same shape and dtype, as of two layers."""
    raw = Raw(weights_file(folder, rng))
    one = raw.header[rng.choice(raw.tensors())]
    same = [
        raw.header[index]
        for index in raw.tensors()
        if all(raw.header[index][1][name] == one[1][name] for name in ("dtype", "shape")) and raw.header[index] != one
    ]
    if not same:
        return None
    other = rng.choice(same)
    (a, b), (c, d) = one[1]["data_offsets"], other[1]["data_offsets"]
    if raw.data[a:b] == raw.data[c:d]:
        return None
    raw.data[a:b], raw.data[c:d] = raw.data[c:d], raw.data[a:b]
    raw.write()
    return f"{one[0]} and {other[0]}"


def copy_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    """A second tensor of the same data under another name, or under the same in another file."""
    raw = Raw(weights_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    files = sorted(folder.glob("*.safetensors"))
    name = rng.choice((key, key + "_2", key.replace("layers.0", "layers.7")))
    target = Raw(rng.choice(files))
    start, stop = entry["data_offsets"]
    offset = len(target.data)
    target.data += raw.data[start:stop]
    target.header.append((name, {**entry, "data_offsets": [offset, offset + stop - start]}))
    target.write()
    return f"{key} -> {name} in {target.path.name}"


def reshape_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    shape = list(entry["shape"])
    count = 1
    for size in shape:
        count *= size
    divisors = [size for size in range(1, min(count, 4096) + 1) if count % size == 0] or [1]
    divisor = rng.choice(divisors)
    entry["shape"] = rng.choice(
        (shape[::-1], [count], [1, *shape], [*shape, 1], [divisor, count // divisor], [count, 1, 1, 1])
    )
    raw.write()
    return f"{key}: {shape} -> {entry['shape']}"


def absurd_shape(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        (
            *([2**40, 2**40], [2**63], [-1, *shape[1:]], [0, *shape[1:]], [0, 2**50], [], [1.5], ["7"], None, "x"),
            [1] * 10_000,
            [s * 2 for s in shape],
            [10**9, *shape[1:]],
        )
    )
    if rng.random() < 0.3:
        start = entry["data_offsets"][0]
        entry["data_offsets"] = [start, start]
    raw.write()
    return f"{key}: {str(entry['shape'])[:60]}"


def retype_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    before = entry["dtype"]
    same = [name for name, width in WIDTHS.items() if width == WIDTHS.get(before) and name != before]
    entry["dtype"] = rng.choice([*same, *same, *WIDTHS, "F4", "ZZ", "", None, 7])
    raw.write()
    return f"{key}: {before} -> {entry['dtype']}"


def offsets(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        (
            *([stop, start], [0, stop - start], [start + 1, stop + 1], [start, stop + 8], [start, 2**63]),
            *([10**12, 10**12 + stop - start], [-8, stop], [start], [], None, "x", [1.5, 2.5]),
        )
    )
    raw.write()
    return f"{key}: {entry['data_offsets']}"


def duplicate_key(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    twin = dict(raw.header[rng.choice(raw.tensors())][1])
    raw.header.insert(rng.randrange(len(raw.header) + 1), (key, rng.choice((entry, twin))))
    raw.write()
    return key


def deep_header(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(weights_file(folder, rng))
    depth = rng.choice((100, 1000, 100_000, 1_000_000))
    raw.write(rng.choice(('{"a":' * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    return f"{raw.path.name}: {depth} levels"


def metadata(folder: Path, others: Path, rng: random.Random) -> str:
    """The checksums themselves."""
    raw = Raw(weights_file(folder, rng))
    index = next((i for i, (key, _) in enumerate(raw.header) if key == "__metadata__"), None)
    if index is None:
        raw.header.insert(0, ("__metadata__", {}))
        index = 0
    entry = dict(raw.header[index][1])
    text = entry.get(ENTRY, "{}")
    position = rng.randrange(len(text))
    entry[ENTRY] = rng.choice(
        (
            *("", "{}", "[]", "null", "unfinished", text[:position], text.replace("crc32", "crc64"), "[" * 100_000),
            text[:position] + rng.choice('0123456789abcdef"{}[],:') + text[position + 1 :],
            text.replace('"tensors": "', '"tensors": "00000000'),
        )
    )
    if rng.random() < 0.1:
        raw.header[index] = ("__metadata__", rng.choice((None, [], "x", {"format": 7}, {ENTRY: {"a": 1}})))
    else:
        raw.header[index] = ("__metadata__", entry)
    raw.write()
    return f"{raw.path.name}: {str(raw.header[index][1])[:60]}"


def not_a_number(folder: Path, others: Path, rng: random.Random) -> str | None:
    raw = Raw(weights_file(folder, rng))
    scales = [index for index in raw.tensors() if "scale" in raw.header[index][0]]
    if not scales:
        return None
    key, entry = raw.header[rng.choice(scales)]
    start, stop = entry["data_offsets"]
    width = WIDTHS[entry["dtype"]]
    place = start + width * rng.randrange((stop - start) // width)
    value = rng.choice((float("nan"), float("inf"), -float("inf")))
    raw.data[place : place + width] = struct.pack("<e" if width == 2 else "<f", value)
    raw.write()
    return f"{key}: {value}"


def columns(folder: Path, others: Path, rng: random.Random) -> str | None:
    """Permutations and salient columns that are none."""
    raw = Raw(weights_file(folder, rng))
    found = [index for index in raw.tensors() if raw.header[index][1]["dtype"] in ("I16", "I32")]
    if not found:
        return None
    key, entry = raw.header[rng.choice(found)]
    start, stop = entry["data_offsets"]
    width = WIDTHS[entry["dtype"]]
    if stop == start:
        return None
    place = start + width * rng.randrange((stop - start) // width)
    value = rng.choice((-1, 0, 5, 2**15 - 1, -(2**15)))
    raw.data[place : place + width] = struct.pack("<h" if width == 2 else "<i", value)
    raw.write()
    return f"{key}: {value}"


def shards_of_another_model(folder: Path, others: Path, rng: random.Random) -> str | None:
    path = weights_file(folder, rng)
    found = [other / path.name for other in sorted(others.iterdir()) if (other / path.name).exists()]
    found = [other for other in found if other.read_bytes() != path.read_bytes()]
    if not found:
        return None
    other = rng.choice(found)
    shutil.copy(other, path)
    return f"{path.name} of {other.parent.name}"
