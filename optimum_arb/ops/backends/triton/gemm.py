"""`x W^T + bias` for many tokens, and the gradient of x.

Four ways, which `GemmConfig.kernel` names:

- "hopper": `hopper.py`, the packed weight decoded once a tile straight into the registers from which the tensor cores
  of an sm_90 read it. Layouts of one to three planes with or without column scales.
- "portable": `portable.py`, the same idea in plain Triton, for every layout without salient columns and every GPU.
- "digits": `digits.py`, up to 16 tokens as 8-bit integers, for the same layouts, where the kernels for few tokens
  (`one_bit.py`) do not run.
- "dequantize": the dense weight is written to memory and multiplied by the vendor's library. Every layout and dtype;
  its cost does not depend on the number of tokens, so it wins where there are many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..packed import PackedWeight
from . import digits
from .dense_plan import DensePlan
from .dequantize import dequantize
from .digits import DigitsPlan
from .gemm_config import GemmConfig, default_config, fits_hopper, is_fusable, split_of
from .hadamard import Transform
from .launch import tensor_class
from .portable import multiply

try:
    from .hopper_group import HopperGroup
    from .hopper_plan import HopperPlan
except (ImportError, AttributeError):  # a Triton without Gluon, or with another form of it
    HopperPlan = HopperGroup = None  # type: ignore[assignment, misc]


def gemm(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`x W^T + bias`.

    Args:
        x: `[M, K]`, float16, bfloat16 or float32.
        packed: the weight, on x's device.
        bias: `[N]`, or None.
        out_dtype: x's where None.
        config: how; a sensible one where None. Replaced by "dequantize" where its kernel cannot compute this weight.

    Returns:
        `[M, N]`, accumulated in float32.
    """
    if x.is_cuda and torch.cuda.current_device() != x.device.index:
        with torch.cuda.device(x.device):
            return gemm(x, packed, bias, out_dtype, config=config)
    out_dtype = out_dtype or x.dtype
    config = config or default_config(packed, x.shape[0], x.dtype)
    fused = x.dtype in (torch.float16, torch.bfloat16) and x.numel() > 0
    if config.kernel == "hopper" and fused and fits_hopper(packed, x.dtype):
        return _hopper(x, packed, bias, out_dtype, config)
    if config.kernel == "portable" and fused and is_fusable(packed):
        return multiply(x, packed, bias, out_dtype, config)
    if config.kernel == "digits" and fused and is_fusable(packed) and x.shape[0] <= digits.MAX_TOKENS:
        return digits.multiply(x, packed, bias, out_dtype, config)
    weight = _dense(packed, x.dtype)
    if bias is None:
        return torch.mm(x, weight.T).to(out_dtype)
    return torch.addmm(bias.to(x.dtype), x, weight.T).to(out_dtype)


def gemm_input_grad(grad: torch.Tensor, packed: PackedWeight, *, config: GemmConfig | None = None) -> torch.Tensor:
    """`grad W`, the gradient of the input, `[M, K]` from `[M, N]`: through the dense weight.

    Args:
        grad: `[M, N]`, float16, bfloat16 or float32.
        packed: the weight.
        config: not used yet by any kernel of this direction.

    Returns:
        `[M, K]` of grad's dtype.
    """
    if grad.is_cuda and torch.cuda.current_device() != grad.device.index:
        with torch.cuda.device(grad.device):
            return gemm_input_grad(grad, packed, config=config)
    return torch.mm(grad, _dense(packed, grad.dtype)).to(grad.dtype)  # autocast gives it a dtype of its own


def _dense(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """`[N, K]`: a view of `[K, N]` where the columns are permuted, because that is written faster."""
    if packed.permutation is not None:
        return dequantize(packed, dtype, transposed=True).T
    return dequantize(packed, dtype)


def _hopper(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype, config: GemmConfig
) -> torch.Tensor:
    # the copy engine wants 16-byte rows; nobody has tried it with rows that share memory
    strided = x.stride(0) % 8 or x.data_ptr() % 16 or x.stride(0) < x.shape[1]
    if x.stride(1) != 1 or (packed.permutation is None and strided):
        x = x.clone(memory_format=torch.contiguous_format)
    found = HopperPlan(
        packed, x.shape[0], x.stride(0), tensor_class(x), out_dtype, bias, x.device, split_of(config, packed), config
    )
    return found.run(x, bias)


def plan(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, config: GemmConfig
) -> HopperPlan | DigitsPlan | DensePlan | None:
    """The launches of `gemm` for any x `[..., K]` of this one's size, made ready.

    None where it is by "portable", where tensors of the weight are not contiguous, and for float64.

    Args:
        x: contiguous and 16-byte aligned, as those that are to follow.
        packed: the weight.
        bias: `[N]`, or None.
        config: how.
    """
    if not x.numel():
        return None
    tokens, columns = x.numel() // packed.in_features, packed.in_features
    kind = (x.dtype, True)
    half = x.dtype in (torch.float16, torch.bfloat16)
    if config.kernel == "digits" and half and is_fusable(packed) and tokens <= digits.MAX_TOKENS:
        if not all(t is None or t.is_contiguous() for t in (packed.row_scale, packed.col_scale, packed.permutation)):
            return None  # copies would not be written with them
        return DigitsPlan(packed, tokens, columns, kind, x.dtype, bias, x.device, config)
    if (config.kernel == "portable" and half and is_fusable(packed)) or x.dtype == torch.float64:
        return None
    if config.kernel != "hopper" or not fits_hopper(packed, x.dtype):
        return DensePlan(packed, x.dtype) if DensePlan.is_ready(packed) else None
    return HopperPlan(packed, tokens, columns, kind, x.dtype, bias, x.device, split_of(config, packed), config)


def plan_group(
    x: torch.Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[torch.Tensor | None],
    configs: Sequence[GemmConfig],
    transform: Transform | None,
) -> HopperGroup | None:
    """`plan` of several weights of one input, all launches made ready; None where one of them is not by "hopper".

    Args:
        x: as in `plan`.
        weights: two or three, with the same number of columns, all of them with an order of columns or none.
        biases: `[N]` of each weight, or None; they stay where they are.
        configs: how each is computed.
        transform: what x goes through first; the weights have no order of columns then. Or None.
    """
    orders = {packed.permutation is None for packed in weights}
    if len(orders) > 1 or len(weights) > 3 or not x.numel():
        return None
    for packed, config in zip(weights, configs, strict=True):
        if config.kernel != "hopper" or packed.weight.device != x.device or not fits_hopper(packed, x.dtype):
            return None
    tokens = x.numel() // x.shape[-1]
    splits = [split_of(config, packed) for config, packed in zip(configs, weights, strict=True)]
    return HopperGroup(weights, biases, tokens, x.dtype, x.device, splits, configs, transform)
