"""Whether a binarized checkpoint is what its configuration says, before anything of it is allocated or run.

`stored.describe` compares the shapes of packed tensors; here are all other tensors, and the values of those that the
operators use as addresses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .config import ARBConfig
from .inspection import tensor_bytes
from .keys import KeyMap
from .packing import STORED_NAMES
from .stored import StoredLinear, StoredTensor

_COMPANION = re.compile(rf"(.+?)_({'|'.join(STORED_NAMES[1:])})")
_NO_FLOATS = re.compile(r"[IU]\d+|BOOL")


def check_other_tensors(
    model: PreTrainedModel, names: KeyMap, headers: Mapping[str, StoredTensor], packed: Collection[str]
) -> None:
    """Whether every tensor of a checkpoint has a place in the model, and those that are not packed have its shape.

    A checkpoint that another class of model saved may hold more. Heads may have other shapes, which
    `ignore_mismatched_sizes` allows and transformers refuses without it, as long as they are no larger than the
    checkpoint.

    Args:
        model: the float model on the meta device.
        names: of its tensors.
        headers: of all tensors of the checkpoint.
        packed: the model's names of what is packed there.

    Raises:
        ValueError: a tensor that the model does not have, or of another shape or kind than the model's.
    """
    expected = model.state_dict()
    total = sum(tensor_bytes(header) for header in headers.values())
    same_class = type(model).__name__ in (model.config.architectures or ())
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    buffers = {name for name, _ in model.named_buffers()}
    for key, header in headers.items():
        companion = _COMPANION.fullmatch(key)
        found = names.names(companion[1] if companion else key)
        if companion is None and len(found) == 1 and found[0] in expected:
            if found[0].removesuffix(".weight") not in packed and not names.is_converted(key):
                _check_float(model, key, header, found[0], expected[found[0]], total)
        elif (
            same_class
            and not any(name in expected or name in buffers for name in found)
            and not any(pattern.search(key) for pattern in ignored)
        ):
            raise ValueError(
                f"The checkpoint holds the tensor {key!r}, which {type(model).__name__} does not have. The checkpoint "
                "or its config.json was changed: save or download the model again."
            )


def _check_float(
    model: PreTrainedModel, key: str, header: StoredTensor, name: str, expected: torch.Tensor, total: int
) -> None:
    prefix = model.base_model_prefix
    head = bool(prefix) and hasattr(model, prefix) and not name.startswith(f"{prefix}.")
    same = header.shape == tuple(expected.shape)
    if not same and (not head or math.prod(expected.shape) * expected.element_size() > total):
        raise ValueError(
            f"The tensor {key!r} is {header} in the checkpoint, but {list(expected.shape)} follows from the model's "
            "config.json. One of the two was changed."
        )
    if expected.is_floating_point() and _NO_FLOATS.fullmatch(header.dtype):
        raise ValueError(
            f"The tensor {key!r} is {header} in the checkpoint, but the model's is of floating-point numbers. It is "
            "packed by other means, or was changed."
        )


def check_permuted(linear: StoredLinear, name: str, config: ARBConfig, calibration: Mapping | None) -> None:
    """Whether a linear whose columns were ordered by activation has its permutation, and one whose inputs go through a
    Hadamard transform the signs of it.

    Without one its columns would be taken for those of the weight. Older checkpoints do not say which linears were
    never reached in calibration, and so have none.

    Args:
        linear: the stored tensors.
        name: the module's in the model that is loaded. The class that was calibrated may have had more or less in front
            of it, and the files may have another.
        config: the configuration of this module.
        calibration: what the checkpoint records of its calibration.

    Raises:
        ValueError: it is missing.
    """
    unreached = (calibration or {}).get("unreached")
    if not isinstance(unreached, list):
        return
    if config.hadamard and "input_signs" not in linear.tensors and not _among(unreached, linear.key, name):
        raise ValueError(
            f"{linear.key}: the tensor '{linear.key}.weight_input_signs' is missing in the checkpoint, though its "
            "inputs go through a Hadamard transform. Save or download the model again."
        )
    if not config.resolved_act_order or "permutation" in linear.tensors:
        return
    if not _among(unreached, linear.key, name):
        raise ValueError(
            f"{linear.key}: the tensor '{linear.key}.weight_permutation' is missing in the checkpoint, though its "
            "columns were ordered by activation. Save or download the model again."
        )


def _among(unreached: list, *names: str) -> bool:
    return any(_same_module(known, name) for known in unreached for name in names)


def _same_module(name: str, other: str) -> bool:
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")


def check_indices(files: Iterable[str], columns: Mapping[str, int]) -> None:
    """Whether permutations are permutations and salient columns are columns, in ascending order.

    Args:
        files: the safetensors files of a checkpoint.
        columns: name of a tensor of salient columns -> columns of its weight. Those of modules that are not loaded
            have no upper bound.

    Raises:
        ValueError: an index out of range, twice, or out of order.
    """
    for path in files:
        with safe_open(path, framework="np") as file:  # transformers may have set torch's device to meta
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                match = _COMPANION.fullmatch(key)
                if match is None or match[2] not in ("permutation", "salient_columns"):
                    continue
                index = file.get_tensor(key).astype(np.int64)
                index = index.reshape(-1, index.shape[-1] if index.ndim else 1)
                count = columns.get(key)
                if match[2] == "permutation":
                    right = bool((np.sort(index) == np.arange(index.shape[-1])).all())
                    meaning = f"no order of the {index.shape[-1]} columns"
                else:
                    right = bool((index >= 0).all() and (np.diff(index) > 0).all())
                    right = right and (count is None or bool((index < count).all()))
                    meaning = f"no list of columns{'' if count is None else f' of {count}'} in ascending order"
                if not right:
                    raise ValueError(
                        f"{match[1].removesuffix('.weight')}: the tensor {key!r} is {meaning}. The checkpoint was "
                        "changed: save or download the model again."
                    )
