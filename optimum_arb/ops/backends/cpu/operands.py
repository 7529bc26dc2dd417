"""What the native kernels are handed: tensors that they can read, of the sizes that they will read.

The kernels get addresses alone: whatever would have them read elsewhere is refused here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from ....format.layout import layout_from_name
from ....format.packing import TENSOR_NAMES, packed_shapes
from ..packed import PackedWeight

# The numbers of the dtypes in which the kernels read floats.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# and the dtypes of all else
_SIGNS, _INDICES = (torch.uint8,), (torch.int16, torch.int32)
_KINDS: dict[str, tuple[torch.dtype, ...]] = {"weight": _SIGNS, "salient_weight": _SIGNS}
_KINDS |= {"permutation": _INDICES, "salient_columns": _INDICES}


@lru_cache(maxsize=1024)
def _sizes(name: str, block_size: int, rows: int, columns: int, salient: int) -> dict[str, int]:
    """Numbers of elements of the tensors of a weight."""
    shapes = packed_shapes(layout_from_name(name), rows, columns, block_size, True, salient)
    return {key: math.prod(shape) for key, shape in shapes.items()}


def check(packed: PackedWeight, bias: torch.Tensor | None) -> None:
    """Whether the kernels will read these tensors and nothing else.

    Raises:
        ValueError: a tensor is on another device, has another number of elements than this weight's, or a dtype that
            the kernels would read as another one.
    """
    salient = 0 if packed.salient_columns is None else packed.salient_columns.numel()
    sizes = _sizes(packed.layout.name, packed.block_size, packed.out_features, packed.in_features, salient)
    for name in TENSOR_NAMES:
        tensor = getattr(packed, name)
        if tensor is not None:
            _check_tensor(name, tensor, sizes.get(name, 0))
    if bias is not None:
        _check_tensor("bias", bias, packed.out_features)


def _check_tensor(name: str, tensor: torch.Tensor, size: int) -> None:
    if not tensor.is_cpu:
        raise ValueError(
            f"The input of a packed linear layer is on the CPU, but its {name} is on {tensor.device}: move both to one "
            "device, or load the weights."
        )
    if tensor.numel() != size:
        raise ValueError(f"The {name} of a packed linear layer is {list(tensor.shape)}: it must have {size} elements.")
    kinds = _KINDS.get(name)
    if tensor.dtype not in kinds if kinds else not tensor.is_floating_point():
        wanted = " or ".join(map(str, kinds or ("a floating dtype",)))
        raise ValueError(f"The {name} of a packed linear layer is {tensor.dtype}: it must be {wanted}.")


def ready_tensor(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a copy that is contiguous and of a dtype that the kernels read."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in TYPES else tensor


def ready(packed: PackedWeight) -> PackedWeight:
    """The same with every tensor contiguous and of a dtype that the kernels read: itself, where they are."""
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    changed: dict[str, Any] = {name: kept for name, each in tensors.items() if (kept := ready_tensor(each)) is not each}
    return replace(packed, **changed) if changed else packed
