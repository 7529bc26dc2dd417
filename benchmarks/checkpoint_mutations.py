"""The changes that benchmarks/fuzz_checkpoints.py makes to saved models, each decided by a random number generator."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_arb.checksums import ENTRY, seal

# What a value of a JSON file may become.
ABSURD: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 63, 65, 1000, 2**31, 2**31 - 1, 2**53, 2**63, 10**12, 10**30),
    *(1e308, -1e308, 1e-300, 0.5, float("nan"), float("inf")),
    *(None, True, False, "", "x", "x" * 100_000, "../../etc/passwd", "\x00", "re:(", "re:(a+)+$", "\ud83d\ude00"),
    *([], {}, [1], [[[]]], {"a": 1}, [None] * 1000, {"re:.*": {"planes": 3}}),
)
WIDTHS = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        kind: name of the function that made it.
        what: what it changed, in words.
        sealed: whether the checksums in the files are still those of the model that was saved. Otherwise they were
            made anew or taken out, as somebody who means harm would do.
    """

    kind: str
    what: str
    sealed: bool = True


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


def mutate(folder: Path, others: Path, rng: random.Random) -> Mutation:
    """Changes the model in `folder` in one way, or, now and then, in two.

    Args:
        folder: the saved model.
        others: a directory with other saved models, from which files may come.
        rng: decides everything.
    """
    first = _once(folder, others, rng)
    # a pipe or a link to /dev/zero, if the first has made one, could not be read to its end by the second
    if rng.random() < 0.1 and all(path.is_file() or path.is_dir() for path in folder.rglob("*")):
        try:
            second = _once(folder, others, rng)
        except Exception:  # the first has left nothing that could be changed so
            return first
        return Mutation(first.kind, f"{first.what}; {second.kind}: {second.what}", first.sealed and second.sealed)
    return first


def _once(folder: Path, others: Path, rng: random.Random) -> Mutation:
    while True:
        change = rng.choice(KINDS)
        what = change(folder, others, rng)
        if what is not None:
            break
    sealed = True
    if change in RESEALED and rng.random() < 0.5:
        sealed = _unseal(folder, rng)
    return Mutation(change.__name__, what, sealed)


def _unseal(folder: Path, rng: random.Random) -> bool:
    """Takes the checksums out of all files, or makes them anew; whether they are as they were after all."""
    try:
        for path in folder.glob("*.safetensors"):
            raw = Raw(path)
            raw.header = [
                (key, {k: v for k, v in value.items() if k != ENTRY} if key == "__metadata__" else value)
                for key, value in raw.header
            ]
            raw.write()
        if rng.random() < 0.5:
            config = json.loads((folder / "config.json").read_text())
            seal(sorted(folder.glob("*.safetensors")), config["quantization_config"])
    except Exception:  # of a file that is not read any more; it is as the change left it
        return False
    return False


def _file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _header_bytes(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


@contextmanager
def _bytes(path: Path) -> Iterator[bytearray]:
    content = bytearray(path.read_bytes())
    yield content
    path.write_bytes(content)


@contextmanager
def _json(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


# Bytes of the weights


def flip_data_bit(folder: Path, others: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    with _bytes(path) as content:
        place = rng.randrange(_header_bytes(path), len(content))
        bit = rng.randrange(8)
        content[place] ^= 1 << bit
    return f"{path.name}: bit {bit} of byte {place}"


def flip_header_bit(folder: Path, others: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    with _bytes(path) as content:
        place = rng.randrange(min(_header_bytes(path), len(content)))
        content[place] ^= 1 << rng.randrange(8)
    return f"{path.name}: byte {place}"


def overwrite_bytes(folder: Path, others: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    with _bytes(path) as content:
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.choice((1, 2, 16, 512, 4096)))
        before = content[start:stop]
        content[start:stop] = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))
        same = before == content[start:stop]
    return f"{path.name}: bytes {start} to {stop}" + (", as they were" if same else "")


def cut_file(folder: Path, others: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    with _bytes(path) as content:
        length = rng.choice((rng.randrange(len(content)), rng.randrange(min(64, len(content))), len(content) - 1))
        del content[length:]
    return f"{path.name}: {length} bytes are left"


def lengthen_file(folder: Path, others: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    more = rng.choice((1, 8, 4096))
    with _bytes(path) as content:
        content += rng.randbytes(more)
    return f"{path.name}: {more} bytes more"


def header_length(folder: Path, others: Path, rng: random.Random) -> str:
    path = _file(folder, rng)
    value = rng.choice((0, 1, 7, 2**62, 2**63, 2**64 - 1, 25_000_001, 100_000_000, rng.randrange(2**16)))
    with _bytes(path) as content:
        content[:8] = struct.pack("<Q", value)
    return f"{path.name}: a header of {value} bytes"


# Tensors


def drop_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(_file(folder, rng))
    key, _ = raw.header.pop(rng.choice(raw.tensors()))
    raw.pack()
    raw.write()
    return key


def rename_tensor(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    before = entry["dtype"]
    same = [name for name, width in WIDTHS.items() if width == WIDTHS.get(before) and name != before]
    entry["dtype"] = rng.choice([*same, *same, *WIDTHS, "F4", "ZZ", "", None, 7])
    raw.write()
    return f"{key}: {before} -> {entry['dtype']}"


def offsets(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
    key, entry = raw.header[rng.choice(raw.tensors())]
    twin = dict(raw.header[rng.choice(raw.tensors())][1])
    raw.header.insert(rng.randrange(len(raw.header) + 1), (key, rng.choice((entry, twin))))
    raw.write()
    return key


def deep_header(folder: Path, others: Path, rng: random.Random) -> str:
    raw = Raw(_file(folder, rng))
    depth = rng.choice((100, 1000, 100_000, 1_000_000))
    raw.write(rng.choice(('{"a":' * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    return f"{raw.path.name}: {depth} levels"


def metadata(folder: Path, others: Path, rng: random.Random) -> str:
    """The checksums themselves."""
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
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
    raw = Raw(_file(folder, rng))
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
    path = _file(folder, rng)
    found = [other / path.name for other in sorted(others.iterdir()) if (other / path.name).exists()]
    found = [other for other in found if other.read_bytes() != path.read_bytes()]
    if not found:
        return None
    other = rng.choice(found)
    shutil.copy(other, path)
    return f"{path.name} of {other.parent.name}"


# Configurations


def _paths(value: Any, place: tuple = ()) -> Iterator[tuple]:
    if place:
        yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _paths(inner, (*place, key))


def _change(content: Any, rng: random.Random, below: str | None = None) -> str:
    places = [place for place in _paths(content) if below is None or place[0] == below]
    place = rng.choice(places)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    before = parent[place[-1]]
    action = rng.random()
    if action < 0.15 and isinstance(parent, dict):
        del parent[place[-1]]
        return f"{'.'.join(map(str, place))} is gone"
    if action < 0.45 and isinstance(before, (int, float)) and not isinstance(before, bool):
        choices = (before + 1, before - 1, before * 2, before // 2, before * 10**6, -before, str(before))
        parent[place[-1]] = rng.choice(choices)
    else:
        parent[place[-1]] = rng.choice(ABSURD)
    return f"{'.'.join(map(str, place))}: {str(before)[:40]!r} -> {str(parent[place[-1]])[:40]!r}"


def config_value(folder: Path, others: Path, rng: random.Random) -> str:
    with _json(folder / "config.json") as content:
        return _change(content, rng)


def quantization_value(folder: Path, others: Path, rng: random.Random) -> str:
    with _json(folder / "config.json") as content:
        if not isinstance(content.get("quantization_config"), dict):
            return config_addition(folder, others, rng)
        return _change(content, rng, "quantization_config")


def config_addition(folder: Path, others: Path, rng: random.Random) -> str:
    with _json(folder / "config.json") as content:
        target = content
        if rng.random() < 0.6 and isinstance(content.get("quantization_config"), dict):
            target = content["quantization_config"]
        key = rng.choice(
            (
                *("overrides", "block_size", "group_bitmap", "verify_checksums", "backend", "method", "planes"),
                *("evil", "base_model_tp_plan", "torch_dtype", "dtype", "attn_implementation", "_attn_implementation"),
                *("head_dim", "num_hidden_layers", "rope_scaling", "layer_types", "text_config", "pruned_heads"),
                *("quantization_config", "use_cache", "id2label", "num_labels", "tie_word_embeddings", "sub_configs"),
            )
        )
        target[key] = rng.choice(ABSURD)
        return f"{key}: {str(target[key])[:40]!r}"


def config_bytes(folder: Path, others: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.glob("*.json")))
    with _bytes(path) as content:
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
            return f"{path.name}: cut"
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        return f"{path.name}: byte {place}"


def deep_json(folder: Path, others: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.glob("*.json")))
    depth = rng.choice((100, 900, 10_000, 1_000_000))
    text = path.read_text().rstrip()
    inner = "[" * depth + "]" * depth
    path.write_text(rng.choice((inner, '{"a":' * depth, text[:-1].rstrip() + f', "deep": {inner}}}')))
    return f"{path.name}: {depth} levels"


def other_architecture(folder: Path, others: Path, rng: random.Random) -> str:
    with _json(folder / "config.json") as content:
        key = rng.choice(("model_type", "architectures"))
        types = (
            "mistral",
            "qwen2",
            "gpt2",
            "opt",
            "bert",
            "t5",
            "mixtral",
            "gemma3",
            "llama4",
            "whisper",
            "mamba",
            "x",
        )
        classes = ("MistralForCausalLM", "LlamaModel", "LlamaForSequenceClassification", "BertModel", "os.system", "")
        content[key] = rng.choice(types) if key == "model_type" else [rng.choice(classes)]
        return f"{key}: {content[key]}"


def index_entries(folder: Path, others: Path, rng: random.Random) -> str | None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return None
    with _json(path) as content:
        places = content["weight_map"]
        key = rng.choice(sorted(places))
        other = rng.choice(sorted(others.iterdir()))
        value = rng.choice(
            (
                f"../others/{other.name}/{places[key]}",
                f"../others/{other.name}/model.safetensors",
                str(other / "model.safetensors"),
                *("/etc/passwd", "/dev/zero", "config.json", "", ".", "missing.safetensors", "x" * 5000, "\x00"),
                *(7, None, ["a"], {"a": "b"}),
            )
        )
        if isinstance(value, str) and rng.random() < 0.3:
            content["weight_map"] = dict.fromkeys(places, value)
        elif rng.random() < 0.2:
            del places[key]
            return f"{key} is gone"
        else:
            places[key] = value
        return f"{key}: {str(value)[:80]!r}"


# Links and other files


def links(folder: Path, others: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    other = rng.choice(sorted(others.iterdir()))
    target = rng.choice(
        ("/dev/zero", "/dev/null", "/etc/passwd", str(path), str(folder), str(other / path.name), "missing")
    )
    path.unlink()
    path.symlink_to(target)
    return f"{path.name} -> {target.replace(str(others.parent), '')}"


def other_kinds_of_files(folder: Path, others: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    kind = rng.choice(("missing", "directory", "pipe", "empty", "unreadable text"))
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"\xff\xfe\x00" * 100)
    return f"{path.name}: {kind}"


class _Evil:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def pickled(folder: Path, others: Path, rng: random.Random) -> str:
    """A pickle that runs code, in the place of the weights or beside them."""
    evil = pickle.dumps(_Evil(str(folder / "executed")))
    name = rng.choice(("pytorch_model.bin", "model.safetensors", "model.bin", "model.pt", "training_args.bin"))
    if rng.random() < 0.6:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    (folder / name).write_bytes(evil)
    return name


def remote_code(folder: Path, others: Path, rng: random.Random) -> str:
    """A configuration that asks for code beside it."""
    code = f"import os\nos.mkdir({str(folder / 'executed')!r})\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_evil.py", "__init__.py", "conftest.py", "setup.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    with _json(folder / "config.json") as content:
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        if rng.random() < 0.5:
            content["model_type"] = "evil"
        if rng.random() < 0.3:
            content["quantization_config"]["auto_map"] = {"AutoConfig": "evil.Evil"}
        return f"auto_map, model_type {content['model_type']}"


RESEALED: tuple[Callable, ...] = (
    *(flip_data_bit, overwrite_bytes, drop_tensor, rename_tensor, swap_tensors, copy_tensor, reshape_tensor),
    *(absurd_shape, retype_tensor, not_a_number, columns, shards_of_another_model, config_value, quantization_value),
    *(config_addition, other_architecture, index_entries),
)
KINDS: tuple[Callable, ...] = (
    *RESEALED,
    *(flip_header_bit, cut_file, lengthen_file, header_length, offsets, duplicate_key, deep_header, metadata),
    *(config_bytes, deep_json, links, other_kinds_of_files, pickled, remote_code),
)
