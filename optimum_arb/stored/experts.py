"""What a checkpoint says of its packed experts, read from its safetensors headers before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import ARBConfig
from ..experts.keys import split_companion
from ..experts.matrices import ExpertMatrix
from ..experts.packing import packed_form
from ..format.packing import TENSOR_NAMES
from .keys import KeyMap
from .linears import StoredLinear, describe
from .tensors import StoredTensor

_DTYPES = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass
class StoredExperts:
    """A matrix of all experts of a layer as the files hold it.

    Attributes:
        name: of the parameter in the model.
        key: the same as the checkpoint would have it, with the prefixes that the saved class had.
        matrix: which one it is.
        tensors: name of a tensor in `TENSOR_NAMES` -> key in the files -> header. One key holds all experts
            (`[E, N, bytes]`), or each the part of one expert (`[N, bytes]`).
    """

    name: str
    key: str
    matrix: ExpertMatrix
    tensors: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The name of the module, as in `key`."""
        return self.key.rpartition(".")[0]

    def keys(self) -> list[str]:
        """All keys in the files."""
        return [key for part in self.tensors.values() for key in part]


def packed_experts(
    headers: Mapping[str, StoredTensor], names: KeyMap, matrices: Mapping[str, ExpertMatrix]
) -> dict[str, StoredExperts]:
    """The matrices of experts that are packed in a checkpoint: by their companions, or by tensors of bytes.

    Args:
        headers: of all tensors of the checkpoint.
        names: of the model.
        matrices: name of a parameter of the model -> which matrix it is.

    Returns:
        Name of a parameter -> what is stored of it.
    """
    found: dict[str, StoredExperts] = {}
    plain: dict[str, dict[str, StoredTensor]] = {}
    for key, header in headers.items() if matrices else ():
        stem, part = split_companion(key)
        name = names.names(stem)[0]
        if name not in matrices:
            continue
        if part == "weight":
            plain.setdefault(name, {})[key] = header
            if header.dtype != "U8":
                continue
        entry = found.setdefault(name, StoredExperts(name, names.saved(stem), matrices[name]))
        if part != "weight":
            entry.tensors.setdefault(part, {})[key] = header
    for name, entry in found.items():
        entry.tensors = {"weight": plain.get(name, {}), **entry.tensors}
    return found


def describe_experts(stored: StoredExperts, config: ARBConfig, matrix: ExpertMatrix) -> dict[str, Any]:
    """How `ARBExperts.set_empty` prepares a stored matrix: form, permuted, salient, dtypes.

    Args:
        stored: its tensors.
        config: the configuration of this matrix.
        matrix: the model's.

    Raises:
        ValueError: a tensor is missing, unknown to the layout, or of the wrong shape or dtype; or the experts differ.
    """
    pieces = matrix.experts * matrix.parts
    shared: dict[str, StoredTensor] = {}
    for part, by_key in stored.tensors.items():
        first = next(iter(by_key), None)
        if first is None:
            raise ValueError(
                f"{stored.name}: its packed signs are missing in the checkpoint. Save or download it again."
            )
        for key, header in by_key.items():
            if (header.shape, header.dtype) != (by_key[first].shape, by_key[first].dtype):
                raise ValueError(
                    f"{stored.name}: the tensor {key!r} is {header} in the checkpoint, but {first!r} is "
                    f"{by_key[first]}. All experts must have the same; one was changed."
                )
        shape = by_key[first].shape
        whole = len(by_key) == 1 and len(shape) == 3
        if (whole and (shape[0] != matrix.experts or shape[1] % matrix.parts)) or (
            not whole and (len(by_key), len(shape)) != (pieces, 2)
        ):
            raise ValueError(
                f"{stored.name}: {len(by_key)} of the tensors {first!r} {by_key[first]} and its like are in the "
                f"checkpoint, but the model has {matrix.experts} experts of {matrix.parts} matrices. Save or download "
                "the model again."
            )
        shape = (shape[1] // matrix.parts, shape[2]) if whole else shape
        shared[part] = StoredTensor(shape, by_key[first].dtype)
    one = describe(StoredLinear(stored.name, shared), config, matrix.part_features, matrix.in_features)
    return {
        "form": packed_form(matrix, config),
        "permuted": one["permuted"],
        "salient": one["salient"],
        "dtypes": {part: _DTYPES[shared[part].dtype] for part in TENSOR_NAMES if part in shared},
    }
