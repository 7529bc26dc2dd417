"""Products of up to 16 tokens with weights that were prepared for them, and which kernel computes them.

The one-bit kernel takes up to 4 tokens, the half-bits kernel up to 16 where the table says that it is the fastest, and
3 and 4 where it says that it is faster than the one-bit kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..packed import PackedWeight
from . import prepack
from .available import fuses_hadamard, has_half_bits_kernel, has_hopper_kernel, has_one_bit_kernel
from .few_tokens_plan import change_class
from .hadamard import transform
from .launch import current_device, hooked
from .table import bucket, lookup

if TYPE_CHECKING:
    from . import few_tokens_plan, half_bits, one_bit

# Tuned numbers of tokens of the kernel that follows the one-bit kernel where the table says that it is the fastest.
HALF_TOKENS = (8, 16)


def few_tokens(
    rows: torch.Tensor,
    weights: list[PackedWeight],
    bias: torch.Tensor | None,
    change: few_tokens_plan.Change | None = None,
) -> torch.Tensor | None:
    """`[M * N]` by the kernels for weights that `prepare` has prepared; None where these are not to be used.

    Args:
        rows: `[M, K]`.
        weights: one, or several of the same input whose results are wanted side by side.
        bias: `[N]`, of all weights together, or None.
        change: see `run_prepared`.

    Returns:
        The results `[M, rows]` of the weights, one after another.
    """
    if not 1 <= rows.shape[0] <= HALF_TOKENS[-1]:
        return None
    weight = prepack.find(weights)
    if weight is None or rows.shape[0] > weight.most_tokens:
        return None
    return run_prepared(rows, weight, bias, tuple(packed.out_features for packed in weights), change=change)


def run_prepared(
    x: torch.Tensor,
    weight: prepack.Prepacked,
    bias: torch.Tensor | None,
    parts: tuple[int, ...],
    *,
    shaped: bool = False,
    change: few_tokens_plan.Change | None = None,
) -> torch.Tensor:
    """`few_tokens` of a weight that `prepare` returned.

    Args:
        x: `[..., K]`.
        weight: see above.
        bias: as in `few_tokens`.
        parts: the rows of each weight that was joined.
        shaped: for one weight: return `[..., N]`.
        change: what x goes through first: permutation, sign and block of `hadamard.transform`. It is part of the
            launch that prepares x where `fuses_hadamard` says so, and then never rounded to the dtype of x.
    """
    if change is not None and not fuses_hadamard(x.device):
        x, change = transform(x, *change), None
    # what the host does for a token is felt: the table is asked once, not at every call
    plan = weight.plans.get(_kind(x, bias, parts, change))
    if plan is not None and plan.contiguous and x.is_contiguous():  # noqa: SIM102 (none of it is asked on a CPU)
        if current_device() == x.get_device() and not hooked():
            return plan.launch(x, bias, x.shape if shaped else None)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if shaped:
        return run_prepared(rows, weight, bias, parts, change=change).view(*x.shape[:-1], weight.rows)
    key = _kind(rows, bias, parts, change)
    plan = weight.plans.get(key)
    if plan is None:
        plan = weight.plans[key] = _plan(rows, weight, bias, parts if len(parts) > 1 else None, change)
    device = rows.device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return plan.run(rows, bias)
    return plan.run(rows, bias)


def _kind(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    parts: tuple[int, ...],
    change: few_tokens_plan.Change | None,
) -> Hashable:
    """Equal for what one plan of a weight serves."""
    if bias is None:
        return x.numel(), x.dtype, x.data_ptr() % 16, parts, change_class(change)
    return x.numel(), x.dtype, x.data_ptr() % 16, parts, change_class(change), bias.dtype, bias.data_ptr() % 16


def _plan(
    rows: torch.Tensor,
    weight: prepack.Prepacked,
    bias: torch.Tensor | None,
    parts: tuple[int, ...] | None,
    change: few_tokens_plan.Change | None,
) -> one_bit.Plan | half_bits.Plan:
    tokens = bucket(rows.shape[0])
    if tokens > prepack.ONE_BIT_TOKENS or tokens in weight.half:
        from . import half_bits

        cut = weight.half.get(tokens) or half_bits.HalfConfig()
        return half_bits.Plan(rows, weight, bias, cut, parts or (weight.rows,), change)
    from . import one_bit

    chosen = decode_config(rows.device, weight.rows, rows.shape[1], weight.program.planes, tokens)
    return one_bit.Plan(rows, weight, bias, chosen, parts or (weight.rows,), None, change)


@cache
def decode_config(
    device: torch.device, out_features: int, in_features: int, planes: int, tokens: int
) -> one_bit.DecodeConfig:
    """The cut of the one-bit kernel for a weight of this shape: the table's, or a guess where it has none."""
    from .one_bit import DecodeConfig

    entry = lookup(device, out_features, in_features, planes, tokens)
    if entry is not None and entry.kernel == "one_bit":
        return DecodeConfig(**entry.config)
    return DecodeConfig(warps=16 if in_features > 4096 and out_features < 12800 else 8)


def prepare(weights: list[PackedWeight]) -> prepack.Prepacked | None:
    """Makes the copy of the weights that `few_tokens` reads, unless there is one.

    Call it outside of CUDA graphs, whose memory is not for what stays.

    Args:
        weights: one, or several of the same input, on a CUDA device.

    Returns:
        The copy; None where the one-bit kernel does not run here or the weights do not fit together.
    """
    device = weights[0].weight.device
    weight = prepack.make(weights) if has_one_bit_kernel(device) else None
    if weight is not None and not weight.half:
        parts = tuple(packed.out_features for packed in weights)
        for tokens in HALF_TOKENS:
            config = _half_config(device, parts, weights[0].in_features, weight.program.planes, tokens)
            if config is None:
                break  # what computes is told by a limit
            weight.half[tokens] = config
        config = _config_for_four(device, sum(parts), weights[0].in_features, weight.program.planes)
        if config is not None:
            weight.half[prepack.ONE_BIT_TOKENS] = config
    return weight


def _config_for_four(
    device: torch.device, out_features: int, in_features: int, planes: int
) -> half_bits.HalfConfig | None:
    """None where the one-bit kernel is faster at 4 tokens for the nearest shape, or nobody has measured it."""
    tokens = prepack.ONE_BIT_TOKENS
    entry = lookup(device, out_features, in_features, planes, tokens, True)
    if entry is None:
        return None
    other = lookup(device, entry.out_features, entry.in_features, planes, tokens)
    if other is None or entry.microseconds >= other.microseconds or not has_half_bits_kernel(device):
        return None
    from .half_bits import HalfConfig

    return HalfConfig(**entry.config)


def _half_config(
    device: torch.device, parts: tuple[int, ...], in_features: int, planes: int, tokens: int
) -> half_bits.HalfConfig | None:
    """None where the kernels that read the stored order are faster, one part after another, or nobody has measured it.

    A shape that was not measured is taken to keep the nearest one's ratio of the two.
    """
    joined = sum(parts)
    entry = lookup(device, joined, in_features, planes, tokens, True)
    if entry is None:
        return None
    took = [
        _stored_order_time(device, rows, columns, planes, tokens)
        for rows, columns in (
            (entry.out_features, entry.in_features),
            (joined, in_features),
            *((n, in_features) for n in parts),
        )
    ]
    if None not in took:
        there, here, *alone = [time for time in took if time is not None]
        if entry.microseconds / there * here > sum(alone):
            return None
    if not has_half_bits_kernel(device):
        return None
    from .half_bits import HalfConfig

    return HalfConfig(**entry.config)


def _stored_order_time(
    device: torch.device, out_features: int, in_features: int, planes: int, tokens: int
) -> float | None:
    """Microseconds of the kernels that read the stored order, by the nearest shape and the number of weights; None
    where nobody has measured it, or it was that of a kernel that does not work here."""
    entry = lookup(device, out_features, in_features, planes, tokens)
    if entry is None or (entry.kernel == "hopper" and not has_hopper_kernel(device)):
        return None
    return entry.microseconds * (out_features * in_features) / (entry.out_features * entry.in_features)
