"""What a checkpoint says of its packed linears, read from its safetensors headers before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..config import ARBConfig
from ..format.factors import ROUNDED_BLOCK, ROUNDED_LAYOUT, factor_shapes
from ..format.packing import STORED_NAMES, packed_shapes
from .tensors import StoredTensor

COMPANIONS = tuple(f"weight_{name}" for name in STORED_NAMES[1:])
_SCALE_DTYPES = {"F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
_INDEX_DTYPES = {"I16": torch.int16, "I32": torch.int32}


@dataclass
class StoredLinear:
    """A packed linear as the files hold it: its name there and its tensors by `packing.STORED_NAMES`."""

    key: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


def packed_linears(headers: Mapping[str, StoredTensor]) -> list[StoredLinear]:
    """The packed linears among the tensors of a checkpoint: by their companions, or by a weight of bytes."""
    linears: dict[str, StoredLinear] = {}
    for key, header in headers.items():
        stem, _, name = key.rpartition(".")
        if name in COMPANIONS:
            linears.setdefault(stem, StoredLinear(stem)).tensors[name.removeprefix("weight_")] = header
        elif name == "weight" and header.dtype == "U8":
            linears.setdefault(stem, StoredLinear(stem)).tensors["weight"] = header
    for stem, linear in linears.items():
        if "weight" not in linear.tensors and f"{stem}.weight" in headers:
            linear.tensors["weight"] = headers[f"{stem}.weight"]
    return list(linears.values())


def describe(linear: StoredLinear, config: ARBConfig, out_features: int, in_features: int) -> dict:
    """How an `ARBLinear` for a stored linear is built: layout, block_size, permuted, salient, scale_dtypes, backend,
    scale_bits, hadamard; an `ARBFactorizedLinear`: rank, scale_dtypes, backend, scale_bits.

    Args:
        linear: the stored tensors.
        config: the configuration of this module.
        out_features: N of the model's module.
        in_features: K of the model's module.

    Raises:
        ValueError: a tensor is missing, unknown to the layout, or of the wrong shape or dtype.
    """
    tensors = linear.tensors
    scale_bits = 8 if "scale_grid" in tensors else 16
    rounded = config.factorized and not any(name.startswith("inner") for name in tensors)
    if config.factorized and not rounded:
        # the tensors say which rank the budget of bits was resolved to
        stored = tensors["inner"].shape if "inner" in tensors else ()
        rank = config.rank or (stored[0] if len(stored) == 2 and stored[0] else 1)
        form = f"layout {config.layout_name}, rank={rank}"
        _check_tensors(linear, config, factor_shapes(out_features, in_features, rank, scale_bits), form)
        common = {"scale_dtypes": _scale_dtypes(linear), "backend": config.backend, "scale_bits": scale_bits}
        return {"rank": rank, **common}
    layout, block_size = (ROUNDED_LAYOUT, ROUNDED_BLOCK) if rounded else (config.layout, config.block_size)
    columns = tensors["salient_columns"].shape if "salient_columns" in tensors else ()
    salient = min(columns[-1], in_features) if columns else 0
    permuted = "permutation" in tensors and not rounded
    hadamard = config.hadamard if "input_signs" in tensors else 0
    if not layout.is_planes:
        scale_bits = 16  # the grid is refused as a tensor that the layout does not have
    shapes = packed_shapes(layout, out_features, in_features, block_size, permuted, salient, scale_bits, hadamard)
    _check_tensors(linear, config, shapes, f"layout {layout.name}, block_size={block_size}")
    return {
        "layout": layout,
        "block_size": block_size,
        "permuted": permuted,
        "salient": salient,
        "scale_dtypes": _scale_dtypes(linear),
        "backend": config.backend,
        "scale_bits": scale_bits,
        "hadamard": hadamard,
    }


def _check_tensors(linear: StoredLinear, config: ARBConfig, shapes: Mapping[str, tuple[int, int]], form: str) -> None:
    """Whether the tensors are those of a form, with its shapes and dtypes. Raises ValueError where they are not."""
    tensors = linear.tensors
    for name in shapes:
        if name not in tensors:
            raise ValueError(
                f"{linear.key}: the tensor {_tensor_key(linear.key, name)!r} is missing in the checkpoint. Save or "
                "download the model again."
            )
    for name, shape in shapes.items():
        key = _tensor_key(linear.key, name)
        dtypes = _dtypes(name, coded="scale_grid" in shapes)
        if tensors[name].dtype not in dtypes or tensors[name].shape != shape:
            raise ValueError(
                f"{linear.key}: the tensor {key!r} is {tensors[name]} in the checkpoint, but {' or '.join(dtypes)} "
                f"{list(shape)} follows from the model's shapes and its quantization_config (method={config.method!r}, "
                f"{form}). One of the two was changed."
            )
    for name in sorted(set(tensors) - set(shapes)):
        raise ValueError(
            f"{linear.key}: the checkpoint holds {_tensor_key(linear.key, name)!r}, which the layout "
            f"{config.layout_name} of method={config.method!r} does not have. The quantization_config was changed."
        )


def _scale_dtypes(linear: StoredLinear) -> dict[str, torch.dtype]:
    return {name: _SCALE_DTYPES[found.dtype] for name, found in linear.tensors.items() if name.endswith("scale")}


def _tensor_key(module: str, name: str) -> str:
    return f"{module}.weight" if name == "weight" else f"{module}.weight_{name}"


def _dtypes(name: str, coded: bool) -> tuple[str, ...]:
    if name.endswith("scale"):
        return tuple(_SCALE_DTYPES) if coded else ("F16", "F32")
    if name == "scale_grid":
        return ("F32",)
    return ("U8",) if name in ("weight", "salient_weight", "inner", "input_signs") else tuple(_INDEX_DTYPES)
