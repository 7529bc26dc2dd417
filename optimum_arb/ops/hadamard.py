"""`torch.ops.optimum_arb.hadamard`: the block Hadamard transform of an input, with its signs and its column order.

    T(x) = Hadamard(sign * x[..., permutation])

`Hadamard` multiplies each block of columns by the orthonormal Hadamard matrix of its width
(`optimum_arb.format.hadamard`). T is orthogonal, so the gradient of its input is its inverse of the gradient of its
output; one operator has both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..format.hadamard import hadamard_blocks, hadamard_matrix
from .autocast import without_autocast
from .backends.triton.available import has_kernels
from .forward_ad import is_transformed, linear_map, register_vmap

torch.library.define(
    "optimum_arb::hadamard",
    "(Tensor x, Tensor? permutation, Tensor sign, int block, bool inverse, str backend) -> Tensor",
)


@without_autocast
def transform(
    x: torch.Tensor,
    permutation: torch.Tensor | None,
    sign: torch.Tensor,
    block: int,
    inverse: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """What the operator computes, without its detour through the dispatcher; without a gradient.

    Args:
        x: `[..., K]`, floating.
        permutation: `[1, K]`, integers: column j of the result's blocks is column `permutation[j]` of x; None for none.
        sign: int8 `[K]`, +1 and -1, in the order of the permuted columns.
        block: columns of a block, a power of two.
        inverse: undo the transform instead.
        backend: of the layer; "reference" is plain torch everywhere.

    Returns:
        `[..., K]` of x's dtype, computed in float32 (float64 for float64 x).

    Raises:
        ValueError: x has another number of columns than `sign`.
    """
    if not x.dim() or x.shape[-1] != sign.shape[0]:
        raise ValueError(
            f"The input of a packed linear layer is {list(x.shape)}: it must be [..., {sign.shape[0]}], the columns "
            "that its Hadamard transform was made for."
        )
    fast = backend != "reference" and x.dtype != torch.float64 and x.numel() and has_kernels(x.device)
    if not inverse:
        if fast:
            from .backends.triton import hadamard

            return hadamard.transform(x, permutation, sign, block, batch_invariant=":" in backend)
        x = x if permutation is None else x.index_select(-1, permutation[0].int())
        return _blocks(x, sign, block).to(x.dtype)
    if fast:
        from .backends.triton import hadamard

        out = hadamard.transform(x, None, None, block, batch_invariant=":" in backend) * sign
    else:
        out = _blocks(x, None, block).mul_(sign).to(x.dtype)
    return out if permutation is None else torch.empty_like(out).index_copy_(-1, permutation[0].long(), out)


def _blocks(x: torch.Tensor, sign: torch.Tensor | None, block: int) -> torch.Tensor:
    """`Hadamard(sign * x)`, in the dtype of the computation."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x = x.to(compute) if sign is None else x.to(compute) * sign
    widths = hadamard_blocks(x.shape[-1], block)
    pieces, start = [], 0
    for width in dict.fromkeys(widths):
        stop = start + width * widths.count(width)
        part = x[..., start:stop].unflatten(-1, (-1, width)) @ _matrix(width, compute, x.device)
        pieces.append(part.flatten(-2))
        start = stop
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


@cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return hadamard_matrix(size, dtype, device) * size**-0.5


@torch.library.impl("optimum_arb::hadamard", "CompositeExplicitAutograd")
def _hadamard(
    x: torch.Tensor, permutation: torch.Tensor | None, sign: torch.Tensor, block: int, inverse: bool, backend: str
) -> torch.Tensor:
    return transform(x, permutation, sign, block, inverse, backend).data


@torch.library.register_fake("optimum_arb::hadamard")
def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, permutation, sign, ctx.block, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(permutation, sign)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    permutation, sign = ctx.saved_tensors
    back = torch.ops.optimum_arb.hadamard(grad, permutation, sign, ctx.block, not ctx.inverse, ctx.backend)
    return back, None, None, None, None, None


torch.library.register_autograd("optimum_arb::hadamard", _backward, setup_context=_setup_context)
register_vmap("hadamard")


def hadamard(
    x: torch.Tensor,
    sign: torch.Tensor,
    permutation: torch.Tensor | None = None,
    *,
    block: int,
    inverse: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`Hadamard(sign * x[..., permutation])`, or its inverse; arguments as in `transform`, with a gradient for x."""
    operator = torch.ops.optimum_arb.hadamard
    if is_transformed():  # orthogonal: its inverse is its transpose
        return linear_map(
            x,
            lambda x, _: operator(x, permutation, sign, block, inverse, backend),
            lambda y, _: operator(y, permutation, sign, block, not inverse, backend),
        )
    return operator(x, permutation, sign, block, inverse, backend)
