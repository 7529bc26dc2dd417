"""`torch.ops.optimum_arb.shared_input_linear`: several packed linear layers of one input, computed together.

The result is one vector, the layers' results one after another; `split_results` gives them their shapes. For inference:
it has no gradient. What the input goes through before it meets all of them (`input_sign`, see `ops.hadamard.transform`)
is a part of it, so that kernels can do both in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from ..format.layout import layout_from_name
from .backends.packed import PackedWeight
from .backends.triton.available import has_kernels
from .hadamard import transform
from .linear import compute

torch.library.define(
    "optimum_arb::shared_input_linear",
    "(Tensor x, Tensor[] weight, Tensor[] row_scale, Tensor[] col_scale, Tensor[] permutation, "
    "Tensor[] salient_columns, Tensor[] salient_weight, Tensor[] salient_col_scale, Tensor? bias, "
    "str layout, int block_size, str backend, Tensor? order=None, Tensor? input_sign=None, int hadamard=0) -> Tensor",
)


def packed_weights(
    columns: int, layout: str, block_size: int, weight: Sequence[torch.Tensor], *rest: Sequence[torch.Tensor]
) -> list[PackedWeight]:
    """The weights whose tensors of a kind stand in one list; a kind that the layout has not is an empty list."""
    found = []
    for i, packed in enumerate(weight):
        others = (tensors[i] if tensors else None for tensors in rest)
        found.append(PackedWeight(layout_from_name(layout), block_size, columns, packed, *others))  # type: ignore[arg-type]
    return found


@torch.library.impl("optimum_arb::shared_input_linear", "CompositeExplicitAutograd")
def _shared_input_linear(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    row_scale: Sequence[torch.Tensor],
    col_scale: Sequence[torch.Tensor],
    permutation: Sequence[torch.Tensor],
    salient_columns: Sequence[torch.Tensor],
    salient_weight: Sequence[torch.Tensor],
    salient_col_scale: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    layout: str,
    block_size: int,
    backend: str,
    order: torch.Tensor | None = None,
    input_sign: torch.Tensor | None = None,
    hadamard: int = 0,
) -> torch.Tensor:
    rest = (row_scale, col_scale, permutation, salient_columns, salient_weight, salient_col_scale)
    weights = packed_weights(x.shape[-1], layout, block_size, weight, *rest)
    change = None if input_sign is None else (order, input_sign, hadamard)
    for packed in weights:
        packed.check()
    if x.is_cuda and backend in ("auto", "triton") and x.dtype in (torch.float16, torch.bfloat16):
        from .backends.triton.available import has_one_bit_kernel

        if has_one_bit_kernel(x.device):
            from .backends.triton.few_tokens import few_tokens

            out = few_tokens(x.reshape(-1, x.shape[-1]), weights, bias, change)
            if out is not None:
                return out
    if change is not None:
        x = transform(x, *change, backend=backend)
    rows = [packed.out_features for packed in weights]
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    return torch.cat([compute(x, packed, b, backend).flatten() for packed, b in zip(weights, biases, strict=True)])


@torch.library.register_fake("optimum_arb::shared_input_linear")
def _fake(x: torch.Tensor, weight: Sequence[torch.Tensor], *rest: Any) -> torch.Tensor:
    return x.new_empty(x.numel() // x.shape[-1] * sum(packed.shape[0] for packed in weight))


class GroupPlan(Protocol):
    """Products of one input that were made ready for inputs of one size and dtype."""

    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The result `[..., N]` of each product, for x as it was announced."""


def plan_group(
    x: torch.Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[torch.Tensor | None],
    transform: tuple[torch.Tensor | None, torch.Tensor, int] | None,
    backend: str,
) -> GroupPlan | None:
    """The products of one input made ready for inputs like x; None where each is computed by itself.

    Args:
        x: floating `[..., K]`, contiguous and 16-byte aligned, on the current CUDA device.
        weights: two or three. Their tensors and the biases are to stay where they are.
        biases: `[N]` of each weight, or None.
        transform: `permutation`, `sign` and `block` of `ops.hadamard.transform`, which x goes through first; or None.
        backend: a name.
    """
    if not has_kernels(x.device) or backend not in ("auto", "triton"):
        return None
    if x.dtype not in (torch.float16, torch.bfloat16):
        return None
    for packed in weights:
        packed.check()
    from .backends.triton import dispatch

    return dispatch.plan_group(x, weights, biases, transform)


# What code that torch compiled calls to view memory another way: half of the time of `as_strided`.
_reinterpret = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", torch.as_strided)


def split_results(
    out: torch.Tensor, shape: Sequence[int], rows: Sequence[int], *, untraced: bool = False
) -> list[torch.Tensor]:
    """The contiguous results `[*shape, rows]` of the layers that `out` holds one after another.

    Args:
        out: one vector.
        shape: the input's, without its last dimension.
        rows: out_features of each layer.
        untraced: nothing but its own kernels knows where `out` came from, so that its views need not be known either.
    """
    if torch.compiler.is_compiling():
        tokens = math.prod(shape)
        parts = out.split([tokens * count for count in rows])
        return [part.view(*shape, count) for part, count in zip(parts, rows, strict=True)]
    # one view a layer, of the result's memory: splitting first and then viewing takes three times as long, which is as
    # long as a launch
    if untraced:
        return [_reinterpret(out, sizes, strides, at) for sizes, strides, at in _places(tuple(shape), tuple(rows))]
    start = out.storage_offset()
    return [out.as_strided(sizes, strides, start + at) for sizes, strides, at in _places(tuple(shape), tuple(rows))]


@lru_cache(maxsize=256)
def _places(shape: tuple[int, ...], rows: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Sizes, strides and first element of each layer's result."""
    found, start = [], 0
    for count in rows:
        strides = [1]
        for size in (count, *reversed(shape[1:])):
            strides.append(strides[-1] * size)
        found.append(((*shape, count), tuple(strides[: len(shape) + 1][::-1]), start))
        start += math.prod(shape) * count
    return found
