"""The Triton backend's `linear` and `input_grad`: chooses a kernel by the number of tokens and the table."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from .. import grouped, reference
from ..grouped import PackedExperts
from ..packed import PackedWeight
from . import digits, prepack
from .available import fuses_hadamard, has_digits_kernel, has_half_bits_kernel, has_one_bit_kernel
from .dequantize import dequantize
from .few_tokens_plan import change_class
from .gemm import gemm, gemm_input_grad
from .gemm import plan as make_plan
from .gemm import plan_group as make_group
from .gemm_config import GemmConfig, default_config, fits_hopper, has_hopper, is_fusable
from .hadamard import Transform, transform
from .launch import current_device, hooked
from .table import bucket, lookup

if TYPE_CHECKING:
    from . import few_tokens_plan, half_bits, one_bit
    from .digits import DigitsPlan
    from .hopper_group import HopperGroup
    from .hopper_plan import HopperPlan

# Tuned numbers of tokens of the kernel that follows the one-bit kernel where the table says that it is the fastest.
HALF_TOKENS = (8, 16)
# Rows of experts, each of which reads a whole weight: about 16 tokens with 4 experts each.
MAX_EXPERT_ROWS = 64

# Every row of a product of any number of tokens is computed alike with these: no sum is split by the number of tokens.
BATCH_INVARIANT = {
    "hopper": GemmConfig("hopper", 64, 128, 8, 4, 1),
    "portable": GemmConfig("portable", 64, 128, 8, 2, 1),
}
BATCH_INVARIANT_ROWS = 64  # of a product by the vendor's library, which chooses its kernel by their number


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
        out = _batch_invariant(rows, packed, bias)
    else:
        found = None if x.dtype == torch.float32 else few_tokens(rows, [packed], bias)
        out = many_tokens(rows, packed, bias) if found is None else found
    return out.view(*x.shape[:-1], packed.out_features)


def _batch_invariant(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    half = rows.dtype in (torch.float16, torch.bfloat16)
    if half and fits_hopper(packed, rows.dtype):
        return gemm(rows, packed, bias, config=BATCH_INVARIANT["hopper"])
    if half and is_fusable(packed):
        return gemm(rows, packed, bias, config=BATCH_INVARIANT["portable"])
    weight = dequantize(packed, rows.dtype)
    bias = None if bias is None else bias.to(rows.dtype)
    padded = rows.new_zeros(-(-len(rows) // BATCH_INVARIANT_ROWS) * BATCH_INVARIANT_ROWS, rows.shape[1])
    padded[: len(rows)] = rows
    out = [torch.nn.functional.linear(some, weight, bias) for some in padded.split(BATCH_INVARIANT_ROWS)]
    return torch.cat(out)[: len(rows)]


def input_grad(grad: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """`grad W`, `[..., K]` from `[..., N]`; dtypes as in `linear`."""
    if grad.dtype == torch.float64:
        return reference.input_grad(grad, packed)
    rows = grad.reshape(-1, packed.out_features)
    return gemm_input_grad(rows, packed).view(*grad.shape[:-1], packed.in_features)


def grouped_linear(x: torch.Tensor, offsets: torch.Tensor, packed: PackedExperts) -> torch.Tensor:
    """Each expert's rows of x times its weight; rows past the last expert's are 0.

    Up to `MAX_EXPERT_ROWS` rows take one launch that asks nothing of the host; more go expert by expert, which waits
    for the offsets.

    Args:
        x: `[M, K]`, rows sorted by expert, on a CUDA device.
        offsets: integers `[E]`, where the rows of each expert end.
        packed: the weights, on the same device.

    Returns:
        `[M, N]` of x's dtype.
    """
    if 0 < x.shape[0] <= MAX_EXPERT_ROWS and packed.parts <= 3 and x.dtype in (torch.float16, torch.bfloat16):
        weight = None
        if has_one_bit_kernel(x.device):
            capturing = torch.cuda.is_current_stream_capturing()
            weight = prepack.find(packed) if capturing else prepack.make(packed)
        if weight is not None:
            from .one_bit import decode

            owner = torch.searchsorted(
                offsets, torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype), right=True
            )
            rows = packed.out_features // packed.parts
            parts = (rows,) * packed.parts if packed.parts > 1 else None
            config = _decode_config(x.device, rows, x.shape[1], weight.program.planes, 1)
            config = replace(config, groups=1)
            x = x if x.stride(1) == 1 else x.contiguous()
            return decode(x, weight, None, config, parts, owner.int()).view(x.shape[0], -1)
    return grouped.linear(x, offsets, packed, lambda part, weight: linear(part, weight, None))


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
    tokens = rows.shape[0]
    if tokens > prepack.ONE_BIT_TOKENS:
        from . import half_bits

        cut = weight.half.get(bucket(tokens)) or half_bits.HalfConfig()
        return half_bits.Plan(rows, weight, bias, cut, parts or (weight.rows,), change)
    from . import one_bit

    chosen = _decode_config(rows.device, weight.rows, rows.shape[1], weight.program.planes, bucket(tokens))
    return one_bit.Plan(rows, weight, bias, chosen, parts or (weight.rows,), None, change)


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
    """Microseconds of the kernels that read the stored order, by the nearest shape and the number of weights."""
    entry = lookup(device, out_features, in_features, planes, tokens)
    if entry is None:
        return None
    return entry.microseconds * (out_features * in_features) / (entry.out_features * entry.in_features)


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
    return gemm(rows, packed, bias, config=_config(rows.device, rows.dtype, rows.shape[0], packed))


def plan(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> HopperPlan | DigitsPlan | None:
    """`many_tokens` made ready for inputs like x, see `gemm.plan`; None where the host has to look at each."""
    config = _config(x.device, x.dtype, x.numel() // packed.in_features, packed)
    return make_plan(x, packed, bias, config)


def plan_group(
    x: torch.Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[torch.Tensor | None],
    transform: tuple[torch.Tensor | None, torch.Tensor, int] | None,
) -> HopperGroup | None:
    """`plan` of two or three weights of one input, see `gemm.plan_group`.

    Args:
        x: see there, and so the others that are not told here.
        weights: see there.
        biases: see there.
        transform: the order of columns, the signs and the block of a `hadamard.transform`, or None.
    """
    columns = x.shape[-1]
    tokens = x.numel() // columns
    configs = [_config(x.device, x.dtype, tokens, packed) for packed in weights]
    change = None
    if transform is not None:
        change = Transform(*transform, tokens, columns, columns, (x.dtype, True), x.device)
    return make_group(x, weights, biases, configs, change)


def _config(device: torch.device, dtype: torch.dtype, tokens: int, packed: PackedWeight) -> GemmConfig:
    shape = (device, packed.out_features, packed.in_features, packed.layout.planes)
    half = dtype in (torch.float16, torch.bfloat16)
    if tokens <= digits.MAX_TOKENS and half and is_fusable(packed) and _needs_digits(device):
        return _tuned(*shape, bucket(tokens)) or digits.default_config(packed, tokens)
    return _tuned(*shape, bucket(max(tokens, 8))) or default_config(packed, tokens, dtype)


_needing_digits: dict[torch.device, bool] = {}


def _needs_digits(device: torch.device) -> bool:
    """Whether few tokens take 8-bit integers, for want of the one-bit kernel, where no table says otherwise."""
    found = _needing_digits.get(device)
    if found is None:
        # the kernels are checked by running them, for which a capture has no room
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return False
        found = _needing_digits[device] = not has_one_bit_kernel(device) and has_digits_kernel(device)
    return found


@cache
def _tuned(device: torch.device, out_features: int, in_features: int, planes: int, tokens: int) -> GemmConfig | None:
    entry = lookup(device, out_features, in_features, planes, tokens)
    if entry is None or entry.kernel == "one_bit":
        return None
    config = GemmConfig(**entry.config)
    # tables are made with a newer Triton; of what it has not, `default_config` finds the next best
    there = has_hopper() if config.kernel == "hopper" else config.kernel != "digits" or has_digits_kernel(device)
    return config if there else None


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
    return weight
