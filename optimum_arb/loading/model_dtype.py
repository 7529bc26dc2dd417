"""The dtype of a model of transformers, which scales of packed weights say nothing of.

transformers takes that of the first float parameter. Where a packed linear comes before any other, as in encoders of
sound that begin with a projection, that would be a scale's float16: inputs would be cast to it, and `save_pretrained`
would write it into `config.json`, so that a model in float32 came back in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn import ARBExperts, ARBLinear


def wrap_dtype() -> None:
    """Makes `PreTrainedModel.dtype` pass over packed tensors; does nothing the second time."""
    plain: Any = PreTrainedModel.dtype  # a property of the class or of one before it
    get = plain.fget
    if hasattr(get, "_optimum_arb"):
        return

    def dtype(self: PreTrainedModel) -> torch.dtype:
        for module in self.modules():
            packed = _packed(module)
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point() and name not in packed:
                    return parameter.dtype
        return get(self)

    dtype.__doc__ = get.__doc__
    setattr(dtype, "_optimum_arb", True)  # noqa: B010 (not a declared attribute)
    setattr(PreTrainedModel, "dtype", property(dtype))  # noqa: B010 (declared as read only)


def _packed(module: nn.Module) -> set[str]:
    """The names of the parameters of a module that hold a packed weight."""
    if isinstance(module, ARBExperts):
        return set(module.packed_names(*module.forms))
    return set(module._parameters) - {"bias"} if isinstance(module, ARBLinear) else set()
