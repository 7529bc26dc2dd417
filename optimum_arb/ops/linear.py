"""`torch.ops.optimum_arb.linear`: a linear layer on packed tensors, one operator for every method and backend.

The operator is opaque to `torch.compile`, has a fake and a formula for the gradients of its input and bias (the packed
tensors have none), and looks at no tensor's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch

from ..format.layout import Layout, layout_from_name
from .autocast import without_autocast
from .backends import cpu, reference
from .backends.packed import PackedWeight
from .backends.triton.available import has_kernels
from .forward_ad import is_transformed, linear_map, register_vmap

# Behind a backend's name: every row of x is computed the same way, whatever the number of rows. GPU kernels only.
BATCH_INVARIANT = ":batch-invariant"

_PACKED = (
    "Tensor weight, Tensor row_scale, Tensor? col_scale, Tensor? permutation, Tensor? salient_columns, "
    "Tensor? salient_weight, Tensor? salient_col_scale"
)
torch.library.define(
    "optimum_arb::linear",
    f"(Tensor x, {_PACKED}, Tensor? bias, str layout, int block_size, str backend) -> Tensor",
)
torch.library.define(
    "optimum_arb::linear_input_grad",
    f"(Tensor grad, {_PACKED}, str layout, int block_size, int in_features, str backend) -> Tensor",
)


class Plan(Protocol):
    """A product that was made ready for inputs of one shape and dtype."""

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x W^T + bias`, for x and bias as they were announced."""


@cache
def _backend(name: str, device: torch.device) -> ModuleType:
    """The backend of this name; "auto" is the fastest that this device has."""
    kind = name.removesuffix(BATCH_INVARIANT)
    if kind == "auto":
        kind = "cpu" if device.type == "cpu" else "triton" if has_kernels(device) else "reference"
    if kind == "reference":
        return reference
    if kind == "cpu":
        if device.type != "cpu":
            raise ValueError(
                f"backend={name!r} was given a tensor on {device}: use backend='auto' or 'reference', or move the "
                "model and its inputs to the CPU."
            )
        return cpu
    if kind == "triton":
        if not has_kernels(device):
            raise ValueError(
                f"backend={name!r} does not run on {device}: it needs Triton and a GPU of compute capability 8.0. Use "
                "backend='auto', which takes what there is."
            )
        from .backends.triton import dispatch

        return dispatch
    raise ValueError(
        f"backend={name!r} is unknown to optimum_arb::linear: use 'auto', 'triton', 'cpu' or 'reference' "
        "('dequantize' is a choice of ARBLinear, not of the operator)."
    )


@without_autocast
def compute(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    """`x W^T + bias` by the backend of this name."""
    chosen = _backend(backend, x.device)
    if not backend.endswith(BATCH_INVARIANT):
        return chosen.linear(x, packed, bias)
    if chosen in (cpu, reference):
        raise ValueError(f"backend={backend!r} is a choice of the GPU kernels; these tensors are on {x.device}.")
    return chosen.linear(x, packed, bias, batch_invariant=True)


def linear_without_grad(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    layout: Layout,
    block_size: int,
    backend: str,
) -> torch.Tensor:
    """What the operator computes, without its detour through the dispatcher (a quarter of the host's time).

    Args:
        x: as in `linear`, and so the others.
        tensors: those of `optimum_arb.format.packing.TENSOR_NAMES`, in this order.
        bias: `[N]`, or None.
        layout: the weight's.
        block_size: as it was packed.
        backend: a name.
    """
    if not x.is_floating_point() or not x.dim():
        raise ValueError(
            f"The input of a packed linear layer is {x.dtype} {list(x.shape)}: it must be floating [..., K]."
        )
    packed = PackedWeight(layout, block_size, x.shape[-1], *tensors)  # type: ignore[arg-type]
    packed.check()
    return compute(x, packed, bias, backend)


def plan(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    layout: Layout,
    block_size: int,
    backend: str,
) -> Plan | None:
    """What `linear_without_grad` runs for inputs like x, made ready; None where there is nothing to keep.

    Args:
        x: floating `[..., K]`, contiguous.
        tensors: as in `linear_without_grad`, and so the others.
        bias: see there.
        layout: see there.
        block_size: see there.
        backend: see there.
    """
    chosen = _backend(backend, x.device)
    if backend.endswith(BATCH_INVARIANT) or chosen is reference:
        return None
    packed = PackedWeight(layout, block_size, x.shape[-1], *tensors)  # type: ignore[arg-type]
    packed.check()
    return chosen.plan(x, packed, bias)


@torch.library.impl("optimum_arb::linear", "CompositeExplicitAutograd")
def _linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, bias, layout, block_size, backend = rest
    # `.data`: backends reshape their result at the end, and autograd lets nobody write in place into a view that an
    # operator returned (PEFT adds its adapters so where a batch mixes several)
    return linear_without_grad(x, tensors, bias, layout_from_name(layout), block_size, backend).data


@torch.library.register_fake("optimum_arb::linear")
def _linear_fake(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.impl("optimum_arb::linear_input_grad", "CompositeExplicitAutograd")
@without_autocast
def _input_grad(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, layout, block_size, in_features, backend = rest
    packed = PackedWeight(layout_from_name(layout), block_size, in_features, *tensors)
    return _backend(backend, grad.device).input_grad(grad, packed)


@torch.library.register_fake("optimum_arb::linear_input_grad")
def _input_grad_fake(grad: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], rest[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *packed, bias, layout, block_size, backend = inputs
    ctx.save_for_backward(*packed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.choices = (layout, block_size, x.shape[-1], backend)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.optimum_arb.linear_input_grad(grad, *ctx.saved_tensors, *ctx.choices)
    if ctx.needs_input_grad[8]:
        compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
        bias_grad = grad.flatten(0, -2).sum(0, dtype=compute) if grad.dim() > 1 else grad
        bias_grad = bias_grad.to(ctx.bias_dtype)
    return (x_grad, *[None] * 7, bias_grad, None, None, None)


torch.library.register_autograd("optimum_arb::linear", _backward, setup_context=_setup_context)


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *packed, layout, block_size, _, backend = inputs
    ctx.save_for_backward(*packed)
    ctx.choices = (layout, block_size, backend)


def _input_grad_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """`grad W` is linear in `grad`: gradients of gradients."""
    back = torch.ops.optimum_arb.linear(grad, *ctx.saved_tensors, None, *ctx.choices)
    return (back, *[None] * 11)


torch.library.register_autograd("optimum_arb::linear_input_grad", _input_grad_backward, setup_context=_setup_input_grad)
register_vmap("linear")
register_vmap("linear_input_grad")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    col_scale: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    salient_columns: torch.Tensor | None = None,
    salient_weight: torch.Tensor | None = None,
    salient_col_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    layout: str,
    block_size: int,
    backend: str = "auto",
) -> torch.Tensor:
    """`x W^T + bias` for a packed weight W.

    Args:
        x: `[..., K]`, of any floating dtype and any batch shape.
        weight: uint8, as `optimum_arb.format.packing.pack` returns it, and so all tensors up to `salient_col_scale`;
            scales may have been cast to another floating dtype.
        row_scale: see `weight`.
        col_scale: see `weight`.
        permutation: see `weight`.
        salient_columns: see `weight`.
        salient_weight: see `weight`.
        salient_col_scale: see `weight`.
        bias: `[N]`, or None.
        layout: the name of the weight's `Layout`.
        block_size: as it was packed.
        backend: "auto", "triton", "cpu" or "reference"; with ":batch-invariant" behind it every row of x is computed
            the same way whatever the number of rows (GPU only).

    Returns:
        `[..., N]` of x's dtype, accumulated in float32 (float64 for float64 x), under autocast too.

    Raises:
        ValueError: the tensors do not fit the layout and x, or the backend is unknown or not for x's device.
    """
    packed = (weight, row_scale, col_scale, permutation, salient_columns, salient_weight, salient_col_scale)
    operators, choices = torch.ops.optimum_arb, (layout, block_size)
    if is_transformed():
        columns = x.shape[-1]
        return linear_map(
            x,
            lambda x, bias: operators.linear(x, *packed, bias, *choices, backend),
            lambda y, _: operators.linear_input_grad(y, *packed, *choices, columns, backend),
            bias,
        )
    return operators.linear(x, *packed, bias, *choices, backend)
