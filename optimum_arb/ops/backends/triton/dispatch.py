"""The Triton backend's `linear` and `input_grad`: chooses a kernel by the number of tokens and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from .. import grouped, reference
from ..grouped import PackedExperts
from ..packed import PackedWeight
from . import digits, prepack
from .available import has_digits_kernel, has_hopper_kernel, has_one_bit_kernel
from .dequantize import dequantize
from .few_tokens import decode_config, few_tokens
from .gemm import gemm, gemm_input_grad
from .gemm import plan as make_plan
from .gemm import plan_group as make_group
from .gemm_config import GemmConfig, default_config, fits_hopper, is_fusable, portable_program, suits_hopper
from .hadamard import Transform
from .table import bucket, lookup

if TYPE_CHECKING:
    from .dense_plan import DensePlan
    from .digits import DigitsPlan
    from .hopper_group import HopperGroup
    from .hopper_plan import HopperPlan

# Rows of experts, each of which reads a whole weight: about 16 tokens with 4 experts each.
MAX_EXPERT_ROWS = 64

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


@cache
def batch_invariant_config(kernel: Literal["hopper", "portable"]) -> GemmConfig:
    """With it every row of a product of any number of tokens is computed alike: no sum is split by their number."""
    if kernel == "hopper":
        return GemmConfig(kernel, 64, 128, 8, 4, 1)
    return GemmConfig(kernel, 64, *portable_program(), 2, 1)


def _batch_invariant(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    half = rows.dtype in (torch.float16, torch.bfloat16)
    if half and fits_hopper(packed, rows.dtype):
        return gemm(rows, packed, bias, config=batch_invariant_config("hopper"))
    if half and is_fusable(packed):
        return gemm(rows, packed, bias, config=batch_invariant_config("portable"))
    weight = dequantize(packed, rows.dtype)
    bias = None if bias is None else bias.to(rows.dtype)
    padded = rows.new_zeros(-(-len(rows) // BATCH_INVARIANT_ROWS) * BATCH_INVARIANT_ROWS, rows.shape[1])
    padded[: len(rows)] = rows
    out = [torch.nn.functional.linear(some, weight, bias) for some in padded.split(BATCH_INVARIANT_ROWS)]
    return torch.cat(out)[: len(rows)].to(rows.dtype)  # autocast gives it a dtype of its own


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
            config = decode_config(x.device, rows, x.shape[1], weight.program.planes, 1)
            config = replace(config, groups=1)
            x = x if x.stride(1) == 1 else x.contiguous()
            return decode(x, weight, None, config, parts, owner.int()).view(x.shape[0], -1)
    return grouped.linear(x, offsets, packed, lambda part, weight: linear(part, weight, None))


def many_tokens(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`[M, N]` by the kernels that read the stored order."""
    return gemm(rows, packed, bias, config=_config(rows.device, rows.dtype, rows.shape[0], packed))


def plan(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None
) -> HopperPlan | DigitsPlan | DensePlan | None:
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
        return _working(_tuned(*shape, bucket(tokens)), packed, dtype) or digits.default_config(packed, tokens)
    tuned = _tuned(*shape, bucket(max(tokens, 8)))
    return _working(tuned, packed, dtype) or default_config(packed, tokens, dtype)


def _working(config: GemmConfig | None, packed: PackedWeight, dtype: torch.dtype) -> GemmConfig | None:
    """None for "hopper" that does not work here, of which `default_config` finds the next best; not kept, since in a
    capture it may not be known yet."""
    if config is None or config.kernel != "hopper" or not suits_hopper(packed, dtype):
        return config
    return config if has_hopper_kernel(packed.weight.device) else None


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
    if config.split_from and (entry.out_features, entry.in_features) != (out_features, in_features):
        config = replace(config, split_k=1, split_from=0)  # where the last round begins depends on the shape
    return None if config.kernel == "digits" and not has_digits_kernel(device) else config
