"""Whether a binarized checkpoint is what its configuration says, before anything of it is allocated or run.

`linears.describe` compares the shapes of packed tensors; here are all other tensors, and the values of those that the
operators use as addresses.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import ARBConfig
from ..format.packing import STORED_NAMES
from .header import Placed, read_header
from .keys import KeyMap
from .linears import StoredLinear
from .tensors import StoredTensor, tensor_bytes

_COMPANION = re.compile(rf"(.+?)_({'|'.join(STORED_NAMES[1:])})")
# The deepest models have about 130.
MAX_LAYERS = 1024
_LAYERS = re.compile(r"(layers?|depth|blocks)$")
_NO_FLOATS = re.compile(r"[IU]\d+|BOOL")
# dtype -> integers of its width, and the bits that are all set in NaN and Inf (of F8_E4M3: in NaN; it has no Inf).
_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x7C),
}


def check_config(config: PreTrainedConfig) -> None:
    """Whether a model can be built, empty, before anything is known of its files.

    A module without its tensors takes about 50 KB and a millisecond.

    Args:
        config: of the model, or of a part of it.

    Raises:
        ValueError: it says that there are more than `MAX_LAYERS` layers, or names no classes as `architectures`.
    """
    names = getattr(config, "architectures", None)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"architectures={str(names)[:100]} in the model's config.json is no list of names. The file was changed: "
            "save or download the model again."
        )
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            check_config(value)
        elif _LAYERS.search(key) and isinstance(value, int) and value > MAX_LAYERS:
            raise ValueError(
                f"{key}={value} in the model's config.json: a model of more than {MAX_LAYERS} layers is not built. The "
                "file was changed: save or download the model again."
            )


def check_files(files: Iterable[str], model: str) -> None:
    """Whether the files of a checkpoint lie together, where the model is, and not where its index leads elsewhere.

    Args:
        files: the paths, as transformers joined them from the directory and the names in the index.
        model: the directory that was loaded, or the name of a model on the Hub.

    Raises:
        ValueError: a name in the index leads out of the directory.
    """
    places = {path: Path(os.path.abspath(path)).parent for path in files}
    root = Path(os.path.abspath(model)) if model and os.path.isdir(model) else next(iter(places.values()))
    for path, folder in places.items():
        if root not in (folder, *folder.parents):
            raise ValueError(
                f"The index of the model's files leads to {path!r}, out of the model's directory. It was changed: save "
                "or download the model again."
            )


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


def check_same_kind(model: PreTrainedModel, names: KeyMap, headers: Mapping[str, StoredTensor]) -> None:
    """Whether a model in which nothing of a checkpoint's packed tensors has a place is a part of what was saved.

    Such as the vision tower of a model whose language model is binarized: then all of it is there in float.

    Args:
        model: the float model on the meta device.
        names: of its tensors.
        headers: of all tensors of the checkpoint.

    Raises:
        ValueError: some of it is not there. A head that another kind of model has too would be all that loads.
    """
    stored = {name for key in headers for name in names.names(key)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(names.expected - stored - tied)
    if missing:
        raise ValueError(
            f"None of the binarized modules of the checkpoint is one of a {type(model).__name__}, which lacks "
            f"{missing[0]!r} besides: it is a checkpoint of another kind of model "
            f"({', '.join(map(str, model.config.architectures or ['unknown']))}), or its config.json was changed."
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
    untransformed = (calibration or {}).get("untransformed")  # where the transform did not pay
    transformed = isinstance(untransformed, list) and not _among([*unreached, *untransformed], linear.key, name)
    if config.hadamard and "input_signs" not in linear.tensors and transformed:
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
    return any(_same_module(known, name) for known in unreached if isinstance(known, str) for name in names)


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


def check_scales(files: Iterable[str]) -> None:
    """Whether all scales of packed weights are finite numbers.

    Args:
        files: the safetensors files of a checkpoint.

    Raises:
        ValueError: NaN or Inf among them; the message names the module.
    """
    for path in files:
        for key, tensor in read_header(path)[0].items():
            match = _COMPANION.fullmatch(key)
            if match is not None and tensor.dtype in _EXPONENTS and not _is_finite(path, tensor):
                raise ValueError(
                    f"{match[1].removesuffix('.weight')}: the tensor {key!r} holds NaN or Inf. The checkpoint is "
                    "damaged, or was binarized from weights that were: save or download the model again."
                )


def _is_finite(path: str, tensor: Placed) -> bool:
    kind, exponent = _EXPONENTS[tensor.dtype]
    bits = np.dtype(kind).type(exponent)
    left = tensor.stop - tensor.start
    with open(path, "rb") as file:
        file.seek(tensor.start)
        while left:
            chunk = file.read(min(left, 1 << 22))
            if not chunk:
                raise ValueError(f"{path} was cut short while it was read. Save or download the model again.")
            left -= len(chunk)
            if ((np.frombuffer(chunk, kind) & bits) == bits).any():
                return False
    return True


def check_shapes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether every parameter loaded in its shape; transformers before 5.23 puts a head of another size in as it is.

    Args:
        model: the model, loaded.
        shapes: name of a parameter -> its shape before it was loaded.

    Raises:
        RuntimeError: one has another shape, as `ignore_mismatched_sizes` would have allowed.
    """
    for name, parameter in model.named_parameters():
        if tuple(parameter.shape) != tuple(shapes.get(name, parameter.shape)):
            raise RuntimeError(
                f"{name} is {list(parameter.shape)} in the checkpoint, but {list(shapes[name])} follows from the "
                "configuration. Load the model as it was saved; transformers 5.23 and later can make a new head with "
                "ignore_mismatched_sizes=True."
            )
