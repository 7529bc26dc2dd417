"""The Triton backend's `linear` and `input_grad`: chooses a kernel by the number of tokens and the table."""

from __future__ import annotations

import torch

from .. import reference
from ..packed import PackedWeight
from . import prepack
from .available import has_one_bit_kernel
from .gemm import GemmConfig, default_config, gemm, gemm_input_grad
from .table import bucket, lookup

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
    """`[M, N]` by the one-bit kernel for weights that `prepare` has prepared; None where it is not to be used.

    Args:
        rows: `[M, K]`.
        weights: one, or several of the same input whose results are wanted side by side.
        bias: `[N]`, of all weights together, or None.
    """
    from .one_bit import MAX_TOKENS, DecodeConfig, decode

    if rows.shape[0] > MAX_TOKENS:
        return None
    weight = prepack.find(weights)
    if weight is None:
        return None
    entry = lookup(rows.device, weight.rows, rows.shape[1], weight.program.planes, bucket(rows.shape[0]))
    if entry is None or entry.kernel != "one_bit":
        if entry is not None and len(weights) == 1:
            return None
        config = DecodeConfig(warps=16 if weight.tiles > 32 and weight.groups < 400 else 8)
    else:
        config = DecodeConfig(**entry.config)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    parts = tuple(packed.out_features for packed in weights)
    return decode(rows, weight, bias, config, parts if len(parts) > 1 else None)


def many_tokens(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`[M, N]` by the kernels that read the stored order."""
    tokens = rows.shape[0]
    entry = lookup(rows.device, packed.out_features, packed.in_features, packed.layout.planes, bucket(max(tokens, 8)))
    if entry is None or entry.kernel == "one_bit":
        config = default_config(packed, tokens, rows.dtype)
    else:
        config = GemmConfig(**entry.config)
    return gemm(rows, packed, bias, config=config)


def prepare(weights: list[PackedWeight]) -> bool:
    """Makes the copy of the weights that `few_tokens` reads, unless there is one.

    Call it outside of CUDA graphs, whose memory is not for what stays.

    Args:
        weights: one, or several of the same input, on a CUDA device.

    Returns:
        Whether `few_tokens` will compute with them.
    """
    if not has_one_bit_kernel(weights[0].weight.device):
        return False
    return prepack.make(weights) is not None
