"""Changes to the JSON files: config.json and the index of the shards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import edited_bytes, edited_json

# What a value of a JSON file may become.
ABSURD: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 63, 65, 1000, 2**31, 2**31 - 1, 2**53, 2**63, 10**12, 10**30),
    *(1e308, -1e308, 1e-300, 0.5, float("nan"), float("inf")),
    *(None, True, False, "", "x", "x" * 100_000, "../../etc/passwd", "\x00", "re:(", "re:(a+)+$", "\ud83d\ude00"),
    *([], {}, [1], [[[]]], {"a": 1}, [None] * 1000, {"re:.*": {"planes": 3}}),
)


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
    with edited_json(folder / "config.json") as content:
        return _change(content, rng)


def quantization_value(folder: Path, others: Path, rng: random.Random) -> str:
    with edited_json(folder / "config.json") as content:
        if not isinstance(content.get("quantization_config"), dict):
            return config_addition(folder, others, rng)
        return _change(content, rng, "quantization_config")


def config_addition(folder: Path, others: Path, rng: random.Random) -> str:
    with edited_json(folder / "config.json") as content:
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
    with edited_bytes(path) as content:
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
    with edited_json(folder / "config.json") as content:
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
    with edited_json(path) as content:
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
