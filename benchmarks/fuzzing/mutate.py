"""`mutate` changes a saved model in one of many ways, which a random number generator decides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimum_arb.stored.checksums import ENTRY, seal

from .configurations import (
    config_addition,
    config_bytes,
    config_value,
    deep_json,
    index_entries,
    other_architecture,
    quantization_value,
)
from .content import cut_file, flip_data_bit, flip_header_bit, header_length, lengthen_file, overwrite_bytes
from .files import Raw
from .other_files import links, other_kinds_of_files, pickled, remote_code
from .tensors import (
    absurd_shape,
    columns,
    copy_tensor,
    deep_header,
    drop_tensor,
    duplicate_key,
    metadata,
    not_a_number,
    offsets,
    rename_tensor,
    reshape_tensor,
    retype_tensor,
    shards_of_another_model,
    swap_tensors,
)

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
