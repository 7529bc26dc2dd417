"""One float linear into its binarized form, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .algorithms import binarize, hadamard_gain, output_error
from .config import ARBConfig
from .format.packing import BinarizedWeight
from .modules import linear_shape
from .nn import ARBFactorizedLinear, ARBLinear, packed_linear

# Where an `ARBLinear` remembers the class that it replaced, if that was not `nn.Linear`.
_FLOAT_CLASS = "_arb_float_class"


@dataclass(frozen=True)
class Record:
    """What is known of how a module was binarized.

    Attributes:
        method: the method that made it.
        weight_error: squared error of the weight over its squared norm, with error correction of the weight that was
            fitted in place of the model's; None for a model loaded binarized.
        output_error: squared error of the module's outputs on the calibration tokens over the outputs' squared norm;
            None without calibration.
        tokens: calibration tokens that reached the module.
        experts: how many matrices it holds, one for each expert; None for a linear.
        starved: experts that too few calibration tokens reached, binarized from their weights alone.
        refined: of refinement, the loss of its decoder layer before and after on the held-out calibration sequences:
            the mean over the tokens of the squared error over the squared target; None without.
        held_out_error: as `output_error`, on calibration sequences that nothing was fitted to; None without such.
        held_out_tokens: how many of their tokens reached the module.
        hadamard_gain: by how much a Hadamard transform of the inputs lowers the output error, as far as fits of some
            rows tell (`optimum_arb.algorithms.hadamard_gain`): the module has one where this is above 1. None where
            none was asked for.
    """

    method: str
    weight_error: float | None = None
    output_error: float | None = None
    tokens: int = 0
    experts: int | None = None
    starved: int = 0
    refined: Sequence[float] | None = None
    held_out_error: float | None = None
    held_out_tokens: int = 0
    hadamard_gain: float | None = None


@torch.no_grad()
def binarize_linear(
    name: str,
    module: nn.Module,
    config: ARBConfig,
    hessian: torch.Tensor | None = None,
    tokens: int = 0,
    hadamard_must_pay: bool = True,
) -> tuple[ARBLinear, Record]:
    """Binarizes an `nn.Linear` or a `Conv1D`, on the device of its weight.

    Args:
        name: the module's name, for errors.
        module: the float module; it is not changed.
        config: the choices for this module.
        hessian: float32 `[K, K]`, X^T X of its inputs, or None.
        tokens: how many inputs are summed in it.
        hadamard_must_pay: whether a Hadamard transform that is asked for is left out where it does not lower the error,
            by fits that take longer than that of the weight.

    Raises:
        ValueError: NaN or Inf in the weight or in the calibration matrix.
    """
    parameter, bias = _tensors(module)
    weight = (parameter.T if type(module) is Conv1D else parameter).detach().to(torch.float32)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight holds NaN or Inf. Check the checkpoint, or skip this module.")
    if hessian is not None and not torch.isfinite(hessian).all():
        raise ValueError(
            f"{name}: the activations that reach it in calibration hold NaN or Inf. Load the model in another dtype "
            "(float32 or bfloat16 instead of float16), or check the checkpoint."
        )
    absent = bias is not None and bias.is_meta
    gain = None
    try:
        if config.hadamard and hadamard_must_pay and hessian is not None:
            gain = hadamard_gain(weight, hessian, config)
            if gain <= 1:
                config = config.without_hadamard()
        found = binarize(weight, hessian, config)
        if gain is not None and gain > 1 and isinstance(found, BinarizedWeight) and not found.hadamard:
            gain = 1.0  # of all rows together it did not pay
        packed = packed_linear(found, None if absent else bias, config.backend, config.resolved_scale_bits)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if absent:  # not loaded yet, or not in the checkpoint: then transformers initializes it, if it may
        packed.register_parameter("bias", bias)
        packed._is_hf_initialized = False
    if type(module) is Conv1D:
        packed.__dict__[_FLOAT_CLASS] = Conv1D
    packed.train(module.training)
    restored = packed.dequantize(torch.float32)
    weight_error = output_error(weight, restored, None)
    errors = None if hessian is None else output_error(weight, restored, hessian)
    return packed, Record(config.method, weight_error, errors, tokens, hadamard_gain=gain)


@torch.no_grad()
def linear_output_error(module: nn.Module, packed: ARBLinear, hessian: torch.Tensor) -> float:
    """The relative squared error of a binarized linear's outputs on inputs of its own, given by their X^T X.

    Args:
        module: the float `nn.Linear` or `Conv1D`.
        packed: its binarized form.
        hessian: float32 `[K, K]`.
    """
    weight = _tensors(module)[0].detach()
    weight = weight.T if type(module) is Conv1D else weight
    return output_error(weight.to(torch.float32), packed.dequantize(torch.float32), hessian)


def empty_linear(module: nn.Module, **description) -> ARBLinear:
    """An `ARBLinear` on the meta device in place of a float linear, for a checkpoint that holds it packed.

    Args:
        module: the float module.
        description: layout, block_size, permuted, salient, scale_dtypes and backend, as `ARBLinear` takes them, or
            rank, scale_dtypes and backend, as `ARBFactorizedLinear` does.
    """
    weight, bias = _tensors(module)
    rows, columns = linear_shape(module)
    kind: type[ARBLinear] = ARBFactorizedLinear if "rank" in description else ARBLinear
    packed = kind(columns, rows, bias=bias is not None, dtype=weight.dtype, device="meta", **description)
    if type(module) is Conv1D:
        packed.__dict__[_FLOAT_CLASS] = Conv1D
    return packed


@torch.no_grad()
def float_linear(packed: ARBLinear, dtype: torch.dtype) -> nn.Module:
    """The plain module with the dequantized weight in `dtype`, of the class that was there before binarization."""
    weight = packed.dequantize(dtype)
    plain: nn.Module
    with torch.device("meta"):
        if packed.__dict__.get(_FLOAT_CLASS) is Conv1D:
            plain = Conv1D(packed.out_features, packed.in_features)
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(packed.in_features, packed.out_features, bias=False)
    plain.register_parameter("weight", nn.Parameter(weight))
    bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().to(dtype))
    plain.register_parameter("bias", bias)
    return plain.train(packed.training)


def _tensors(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of a linear."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    return weight, bias
