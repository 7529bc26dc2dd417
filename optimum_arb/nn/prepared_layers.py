"""What a GPU keeps of a layer for few tokens: a copy of its weight in the order of their kernels, and how it is run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops.backends.triton.available import fuses_hadamard, has_one_bit_kernel

if TYPE_CHECKING:
    from ..ops.backends.triton.prepack import Prepacked
    from .input_transform import InputTransform
    from .product import PackedProduct

MAX_TOKENS = 4  # of the kernels for few tokens, as long as no copy for them is made that says otherwise

# Two threads that meet the same layers for the first time would each copy the weights.
_PREPARING = threading.RLock()


def prepare_layer(layer: PackedProduct) -> Prepacked | None:
    """Makes what the kernel for few tokens needs, once the layer's tensors are on a GPU that has it.

    Returns:
        The layer's own copy of its weight; None where it shares one with others or has none.
    """
    weight = layer.packed_weight()
    if layer.is_offloaded or not has_one_bit_kernel(weight.weight.device):
        return None
    from ..ops.backends.triton.few_tokens import prepare

    if layer.hadamard:
        fuses_hadamard(weight.weight.device)  # found out now: a call may be captured in a CUDA graph
    with _PREPARING:
        shared = layer.shared_input
        if shared is not None and shared.prepare():
            return None
        return prepare([weight])


def run_prepared_layer(
    x: torch.Tensor, prepared: Prepacked, bias: torch.Tensor | None, change: InputTransform | None = None
) -> torch.Tensor:
    """A layer's result for few tokens, without the operator's detour: `[..., K]` to `[..., N]`."""
    transform = None if change is None else change[:3]
    return runner()(x, prepared, bias, (prepared.rows,), shaped=True, change=transform)


@cache
def runner() -> Callable[..., torch.Tensor]:
    """`few_tokens.run_prepared` of the Triton backend.

    Triton is not imported where nothing runs on a GPU; an import at each call would take as long as a launch.
    """
    from ..ops.backends.triton.few_tokens import run_prepared

    return run_prepared


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a hook of accelerate brings the layer's weights to the GPU for the time of a call: no copy is to stay."""
    hook = layer.__dict__.get("_hf_hook")  # a module raises and catches an error to say that it has no attribute
    if hook is None:
        return False
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))
