"""The Triton backend's `linear` and `input_grad`: chooses a kernel by the number of tokens and the table."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from .. import reference
from ..packed import PackedWeight
from . import prepack
from .available import has_one_bit_kernel
from .gemm import GemmConfig, default_config, gemm, gemm_input_grad
from .table import bucket, lookup

if TYPE_CHECKING:
    from . import one_bit

MAX_TOKENS = 4  # of the one-bit kernel

# Every row of a product of any number of tokens is computed alike with this: no sum is split by the number of tokens.
BATCH_INVARIANT = GemmConfig("hopper", 64, 128, 8, 4, 1)


def linear(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, *, batch_invariant: bool = False
) -> torch.Tensor:
    """`x W^T + bias`, accumulated in float32; float64 x takes the reference backend.

    Args:
        x: `[..., K]`, floating, on a CUDA device.
        packed: the weight, on the same device.
        bias: `[N]`, or None.
        batch_invariant: compute every row of x the same way whatever the number of rows. Costs speed.

    Returns:
        `[..., N]` of x's dtype.
    """
    if x.dtype == torch.float64:
        return reference.linear(x, packed, bias)
    rows = x.reshape(-1, packed.in_features)
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], packed.out_features)
    if batch_invariant:
        out = gemm(rows, packed, bias, config=BATCH_INVARIANT)
    else:
        found = None if x.dtype == torch.float32 else few_tokens(rows, [packed], bias)
        out = many_tokens(rows, packed, bias) if found is None else found
    return out.view(*x.shape[:-1], packed.out_features)


def input_grad(grad: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """`grad W`, `[..., K]` from `[..., N]`; dtypes as in `linear`."""
    if grad.dtype == torch.float64:
        return reference.input_grad(grad, packed)
    rows = grad.reshape(-1, packed.out_features)
    return gemm_input_grad(rows, packed).view(*grad.shape[:-1], packed.in_features)


def few_tokens(rows: torch.Tensor, weights: list[PackedWeight], bias: torch.Tensor | None) -> torch.Tensor | None:
    """`[M * N]` by the one-bit kernel for weights that `prepare` has prepared; None where it is not to be used.

    Args:
        rows: `[M, K]`.
        weights: one, or several of the same input whose results are wanted side by side.
        bias: `[N]`, of all weights together, or None.

    Returns:
        The results `[M, rows]` of the weights, one after another.
    """
    if rows.shape[0] > MAX_TOKENS:
        return None
    weight = prepack.find(weights)
    if weight is None:
        return None
    return run_prepared(rows, weight, bias, tuple(packed.out_features for packed in weights))


def run_prepared(
    rows: torch.Tensor, weight: prepack.Prepacked, bias: torch.Tensor | None, parts: tuple[int, ...]
) -> torch.Tensor:
    """`few_tokens` of a weight that `prepare` returned; `parts` are the rows of each weight that was joined."""
    from .one_bit import decode

    if rows.stride(1) != 1:
        rows = rows.contiguous()
    config = _decode_config(rows.device, weight.rows, rows.shape[1], weight.program.planes, bucket(rows.shape[0]))
    return decode(rows, weight, bias, config, parts if len(parts) > 1 else None)


@cache
def _decode_config(
    device: torch.device, out_features: int, in_features: int, planes: int, tokens: int
) -> one_bit.DecodeConfig:
    from .one_bit import DecodeConfig

    entry = lookup(device, out_features, in_features, planes, tokens)
    if entry is not None and entry.kernel == "one_bit":
        return DecodeConfig(**entry.config)
    return DecodeConfig(warps=16 if in_features > 4096 and out_features < 12800 else 8)


def many_tokens(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`[M, N]` by the kernels that read the stored order."""
    tokens = rows.shape[0]
    planes = packed.layout.planes
    config = _tuned(rows.device, packed.out_features, packed.in_features, planes, bucket(max(tokens, 8)))
    return gemm(rows, packed, bias, config=config or default_config(packed, tokens, rows.dtype))


@cache
def _tuned(device: torch.device, out_features: int, in_features: int, planes: int, tokens: int) -> GemmConfig | None:
    entry = lookup(device, out_features, in_features, planes, tokens)
    return None if entry is None or entry.kernel == "one_bit" else GemmConfig(**entry.config)


def prepare(weights: list[PackedWeight]) -> prepack.Prepacked | None:
    """Makes the copy of the weights that `few_tokens` reads, unless there is one.

    Call it outside of CUDA graphs, whose memory is not for what stays.

    Args:
        weights: one, or several of the same input, on a CUDA device.

    Returns:
        The copy; None where the one-bit kernel does not run here or the weights do not fit together.
    """
    return prepack.make(weights) if has_one_bit_kernel(weights[0].weight.device) else None
