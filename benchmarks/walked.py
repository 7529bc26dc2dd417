"""What the studies share that walk through a model themselves: what binarizes a linear, and a dense model again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from optimum_arb.conversion import binarize_linear, float_linear
from optimum_arb.format.packing import stored_bytes
from optimum_arb.modules import Selection
from optimum_arb.nn import ARBLinear


def binarizer(selection: Selection) -> Callable[..., tuple[ARBLinear, float | None]]:
    """What `CalibrationWalk` calls for each linear: its packed form and the error of its outputs."""

    def binarize(name: str, module: nn.Module, hessian: torch.Tensor | None, count: int):
        packed, record = binarize_linear(name, module, selection.convert[name], hessian, count)
        return packed, record.output_error

    return binarize


def make_dense(model: nn.Module) -> float:
    """Puts float linears in the place of binarized ones; the true bits a weight of these."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, ARBLinear)}
    bits = sum(stored_bytes(module.packed()) * 8 for module in packed.values())
    for name, module in packed.items():
        model.set_submodule(name, float_linear(module, torch.float32))
    return bits / sum(module.in_features * module.out_features for module in packed.values())
