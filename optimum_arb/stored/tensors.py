"""The tensors of a checkpoint, in a directory or on the Hub, read from the headers of its safetensors files alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError, safe_open

from .header import check_header_length

# `save_pretrained(..., variant="fp16")` puts the name between the stem and the ending, of an index before ".json".
_VARIANT = re.compile(
    r"model(\.(?P<single>[^.]+?))?(?<!-of-\d{5})\.safetensors|model\.safetensors\.index(\.(?P<index>[^.]+))?\.json"
)


@dataclass(frozen=True)
class StoredTensor:
    """Shape and safetensors dtype name ("U8", "F16", ...) of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def tensor_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor's data in its file. The name of its dtype holds the bits: F16, U8, F8_E4M3; BOOL is a byte."""
    bits = re.search(r"\d+", tensor.dtype)
    return math.prod(tensor.shape) * (int(bits.group()) if bits else 8) // 8


def read_headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint.

    Raises:
        ValueError: a file that is not safetensors, or is damaged or cut short; a tensor that is in two files.
    """
    headers: dict[str, StoredTensor] = {}
    for path in files:
        check_header_length(path)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    if key in headers:
                        raise ValueError(f"The tensor {key!r} is in {path} and in another file of the checkpoint too.")
                    part = file.get_slice(key)
                    headers[key] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no intact safetensors file: {error}. Save or download the model again."
            ) from None
    return headers


def stored_variant(directory: str | Path) -> str | None:
    """The variant that the weights in a directory were saved as; None where they are of none, or there are none.

    Raises:
        ValueError: there are several and nothing says which one counts.
    """
    names = [_VARIANT.fullmatch(path.name) for path in Path(directory).iterdir()]
    variants = {match["single"] or match["index"] for match in names if match is not None}
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        raise ValueError(
            f"{directory} holds {len(variants)} variants of a model ({', '.join(sorted(variants))}) and none without "
            "a name. Keep each in a directory of its own."
        )
    return variants.pop()


def stored_tensors(name: str | Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of all safetensors files of a model, and the bytes of the files."""
    if not Path(name).is_dir():
        return _headers_of_hub(str(name))
    variant = stored_variant(name)
    part = "" if variant is None else f".{variant}"
    index = Path(name) / f"model.safetensors.index{part}.json"
    files = [Path(name) / f"model{part}.safetensors"]
    if index.is_file():
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{index} is no index of safetensors files. Save or download the model again.") from None
        files = [Path(name) / file for file in sorted(set(entries))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: {name} holds no complete binarized model.")
    return read_headers(str(file) for file in files), sum(file.stat().st_size for file in files)


def _headers_of_hub(name: str) -> tuple[dict[str, StoredTensor], int]:
    tensors: dict[str, StoredTensor] = {}
    size = 0
    for content in get_safetensors_metadata(name).files_metadata.values():
        for key, info in content.tensors.items():
            tensors[key] = StoredTensor(tuple(info.shape), str(info.dtype))
        # The client keeps the metadata and not the length of the header that it came in: only the data are counted.
        size += max((info.data_offsets[1] for info in content.tensors.values()), default=0)
    return tensors, size
