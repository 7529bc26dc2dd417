"""What every packed linear must do, whatever its form."""

from __future__ import annotations

import copy
import io

import torch
from packed_weights import relative_error
from torch import nn

from optimum_arb.nn import ARBLinear


def dense(module: ARBLinear, x: torch.Tensor) -> torch.Tensor:
    """What the layer must put out, in float64, from its dequantized weight."""
    bias = None if module.bias is None else module.bias.double()
    return nn.functional.linear(x.double(), module.dequantize(torch.float64), bias)


def copies(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A deep copy, and one that was saved and loaded."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return copy.deepcopy(module), torch.load(buffer, weights_only=False)


def gradient_reaches_input_and_bias_alone(module: ARBLinear, tolerance: float) -> None:
    x = torch.randn(3, module.in_features, requires_grad=True)
    upstream = torch.randn(3, module.out_features)
    module(x).backward(upstream)
    assert relative_error(x.grad, upstream @ module.dequantize()) < tolerance
    assert relative_error(module.bias.grad, upstream.sum(0)) < 2e-6
    assert all(p.grad is None for name, p in module.named_parameters() if name != "bias")


def compiles_as_one_graph(module: ARBLinear, tolerance: float) -> None:
    """For several shapes in turn, gradient included."""
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    columns = module.in_features
    for shape in ((1, columns), (4, columns), (2, 20, columns), (1, columns)):
        x = torch.randn(shape, requires_grad=True)
        result = compiled(x)
        assert relative_error(result, dense(module, x)) < tolerance
        result.sum().backward()
        assert relative_error(x.grad, module.dequantize().sum(0).expand(shape)) < tolerance
