"""`torch.ops.optimum_arb.grouped_linear`: the linear layers of all experts on packed tensors, in one call.

Rows of x are sorted by expert. The operator is opaque to `torch.compile`, has a fake and a formula for the gradient of
its input, and neither looks at the offsets' values. A backend that has `grouped_linear(x, offsets, packed)` runs it,
one that has `grouped_input_grad(grad, offsets, packed)` the gradient; otherwise, and where every row is to be computed
alike, the backend's product of one matrix runs expert by expert.
"""

from __future__ import annotations

from typing import Any

import torch

from ..format.layout import layout_from_name
from .autocast import without_autocast
from .backends import grouped
from .backends.grouped import PackedExperts
from .forward_ad import is_transformed, linear_map
from .linear import _PACKED, BATCH_INVARIANT, _backend, compute

torch.library.define(
    "optimum_arb::grouped_linear",
    f"(Tensor x, Tensor offsets, {_PACKED}, str layout, int block_size, int parts, str backend) -> Tensor",
)
torch.library.define(
    "optimum_arb::grouped_linear_input_grad",
    f"(Tensor grad, Tensor offsets, {_PACKED}, str layout, int block_size, int parts, int in_features, str backend) "
    "-> Tensor",
)


@torch.library.impl("optimum_arb::grouped_linear", "CompositeExplicitAutograd")
@without_autocast
def _grouped_linear(x: torch.Tensor, offsets: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, layout, block_size, parts, backend = rest
    if not x.is_floating_point() or x.dim() != 2:
        raise ValueError(f"The input of packed experts is {x.dtype} {list(x.shape)}: it must be floating [M, K].")
    packed = PackedExperts(layout_from_name(layout), block_size, parts, x.shape[1], *tensors)
    packed.check(offsets)
    own = getattr(_backend(backend, x.device), "grouped_linear", None)
    if own is not None and not backend.endswith(BATCH_INVARIANT):
        return own(x, offsets, packed)
    return grouped.linear(x, offsets, packed, lambda rows, weight: compute(rows, weight, None, backend))


@torch.library.register_fake("optimum_arb::grouped_linear")
def _grouped_linear_fake(x: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.impl("optimum_arb::grouped_linear_input_grad", "CompositeExplicitAutograd")
@without_autocast
def _input_grad(grad: torch.Tensor, offsets: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, layout, block_size, parts, in_features, backend = rest
    packed = PackedExperts(layout_from_name(layout), block_size, parts, in_features, *tensors)
    module = _backend(backend, grad.device)
    own = getattr(module, "grouped_input_grad", None)
    return grouped.input_grad(grad, offsets, packed, module.input_grad) if own is None else own(grad, offsets, packed)


@torch.library.register_fake("optimum_arb::grouped_linear_input_grad")
def _input_grad_fake(grad: torch.Tensor, offsets: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], rest[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, offsets, *packed, layout, block_size, parts, backend = inputs
    ctx.save_for_backward(offsets, *packed)
    ctx.choices = (layout, block_size, parts, x.shape[1], backend)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.optimum_arb.grouped_linear_input_grad(grad, *ctx.saved_tensors, *ctx.choices)
    return (x_grad, *[None] * 12)


torch.library.register_autograd("optimum_arb::grouped_linear", _backward, setup_context=_setup_context)


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, offsets, *packed, layout, block_size, parts, _, backend = inputs
    ctx.save_for_backward(offsets, *packed)
    ctx.choices = (layout, block_size, parts, backend)


def _input_grad_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As of `optimum_arb::linear_input_grad`."""
    back = torch.ops.optimum_arb.grouped_linear(grad, *ctx.saved_tensors, *ctx.choices)
    return (back, *[None] * 13)


torch.library.register_autograd(
    "optimum_arb::grouped_linear_input_grad", _input_grad_backward, setup_context=_setup_input_grad
)


def grouped_linear(
    x: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    col_scale: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    salient_columns: torch.Tensor | None = None,
    salient_weight: torch.Tensor | None = None,
    salient_col_scale: torch.Tensor | None = None,
    *,
    layout: str,
    block_size: int,
    parts: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """`x_e W_e^T` for the rows of each expert e.

    Args:
        x: `[M, K]`, of any floating dtype, rows sorted by expert.
        offsets: int32 or int64 `[E]`, not falling: the rows of expert e are `offsets[e - 1]` to `offsets[e]`.
        weight: uint8 `[E, N, bytes]`, as `optimum_arb.experts.packing.stack_experts` returns it, and so all tensors up
            to `salient_col_scale`; scales may have been cast to another floating dtype.
        row_scale: see `weight`.
        col_scale: see `weight`.
        permutation: see `weight`.
        salient_columns: see `weight`.
        salient_weight: see `weight`.
        salient_col_scale: see `weight`.
        layout: the name of the weights' `Layout`.
        block_size: as they were packed.
        parts: matrices of an expert that lie below each other.
        backend: as for `optimum_arb.ops.linear`.

    Returns:
        `[M, N]` of x's dtype, accumulated as in `optimum_arb.ops.linear`; rows from `offsets[-1]` on are 0.

    Raises:
        ValueError: the tensors do not fit each other, or the backend is unknown or not for x's device.
    """
    packed = (weight, row_scale, col_scale, permutation, salient_columns, salient_weight, salient_col_scale)
    operators, choices = torch.ops.optimum_arb, (layout, block_size, parts)
    if is_transformed():
        columns = x.shape[-1]
        return linear_map(
            x,
            lambda x, _: operators.grouped_linear(x, offsets, *packed, *choices, backend),
            lambda y, _: operators.grouped_linear_input_grad(y, offsets, *packed, *choices, columns, backend),
        )
    return operators.grouped_linear(x, offsets, *packed, *choices, backend)
