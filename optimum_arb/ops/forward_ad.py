"""Forward-mode derivatives and transforms of the operators: `torch.autograd.forward_ad`, `torch.func`.

An operator of a library has a formula for gradients and no place for one of tangents: where no input requires a
gradient, torch hands its kernel the values alone, and tangents are gone without a word. Nor do the transforms of
`torch.func` take such a formula. All operators here are linear in their input, so that a tangent goes through the same
product, and many inputs of `vmap` are the rows of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

Product = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


_innermost: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


def is_transformed() -> bool:
    """Whether tensors may be more than their values now: within `dual_level` or a transform of `torch.func`."""
    return forward_ad._current_level >= 0 or (not torch.compiler.is_compiling() and _innermost() is not None)


# whether a dispatch mode is active is a plain attribute, which an older torch may not have
_WATCHES = hasattr(_python_dispatch, "_is_in_torch_dispatch_mode")


def is_more_than_values() -> bool:
    """Whether an operator must be called and not its kernel, outside of compiled code: tensors may be transformed, or
    operators are looked at, or replaced, on the way to kernels (`FakeTensorMode`, `make_fx`, ...)."""
    return (
        (_WATCHES and _python_dispatch._is_in_torch_dispatch_mode)
        or _innermost() is not None
        or forward_ad._current_level >= 0
    )


def register_vmap(name: str) -> None:
    """Tells torch how `vmap` calls an operator of this name, whose first argument is `[..., K]`, for many of these."""

    def rule(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
        operator = getattr(torch.ops.optimum_arb, name)
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            return operator(x.movedim(in_dims[0], 0), *rest), 0
        args = list(zip((x, *rest), in_dims, strict=True))
        each = [[a if dim is None else a.select(dim, i) for a, dim in args] for i in range(info.batch_size)]
        return torch.stack([operator(*one) for one in each]), 0

    torch.library.register_vmap(f"optimum_arb::{name}", rule)


def linear_map(
    x: torch.Tensor, product: Product, transposed: Product, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`product(x, bias)`, with tangents and gradients of x and bias, within all transforms.

    Args:
        x: `[..., K]`.
        product: (x, bias) -> `x W^T + bias` `[..., N]`, of the dtype of x, without tangents.
        transposed: (y, None) -> `y W`.
        bias: `[N]`, or None.
    """
    return _LinearMap.apply(x, bias, product, transposed)


class _LinearMap(torch.autograd.Function):
    generate_vmap_rule = True  # `jacfwd` maps over tangents

    @staticmethod
    def forward(x: torch.Tensor, bias: torch.Tensor | None, product: Product, transposed: Product) -> torch.Tensor:
        return product(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, bias, ctx.product, ctx.transposed = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.like = output.shape, output.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _LinearMap.apply(grad, None, ctx.transposed, ctx.product)
        if ctx.needs_input_grad[1]:
            compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
            bias_grad = grad.flatten(0, -2).sum(0, dtype=compute) if grad.dim() > 1 else grad
            bias_grad = bias_grad.to(ctx.bias_dtype)
        return x_grad, bias_grad, None, None

    @staticmethod
    def jvp(ctx: Any, x: torch.Tensor | None, bias: torch.Tensor | None, *rest: None) -> torch.Tensor:
        shape, dtype = ctx.like
        of_bias = None if bias is None else bias.to(dtype).expand(shape)
        if x is None:
            assert of_bias is not None  # one of the two has a tangent
            return of_bias
        of_x = _LinearMap.apply(x, None, ctx.product, ctx.transposed)
        return of_x if of_bias is None else of_x + of_bias
