"""Weights, inputs and layers on a GPU for the tests of its kernels, and how exact these are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_weights import random_binarized, random_packed
from torch import nn

from optimum_arb.format.layout import all_layouts
from optimum_arb.format.packing import TENSOR_NAMES
from optimum_arb.nn import ARBLinear
from optimum_arb.ops import linear
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton.available import has_kernels, has_one_bit_kernel

DEVICE = torch.device("cuda", 0)
NEEDS_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not has_kernels(DEVICE), reason="needs a GPU with kernels"),
    pytest.mark.usefixtures("poisoned"),
]
LAYOUTS = {layout.name: layout for layout in all_layouts()}
# bfloat16 rounds each scale product, their sum over the planes and the result, by 2^-9 at most each; measured: 3.8e-3
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}


def moved(packed: PackedWeight, device: torch.device = DEVICE) -> PackedWeight:
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    return replace(packed, **{name: t.to(device) for name, t in tensors.items() if t is not None})


def random_weight(name: str, *shape: int, prepared: bool = True, **choices) -> PackedWeight:
    packed = moved(random_packed(LAYOUTS[name], *shape, **choices))
    if prepared:
        from optimum_arb.ops.backends.triton.few_tokens import prepare

        assert (prepare([packed]) is not None) == has_one_bit_kernel(DEVICE)
    return packed


def random_input(m: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, backend: str = "triton"):
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    return linear(x, **tensors, bias=bias, layout=packed.layout.name, block_size=packed.block_size, backend=backend)


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm; NaN where there is one."""
    return float((value.double() - expected).norm() / expected.norm())


def check(x: torch.Tensor, packed: PackedWeight, backend: str = "triton") -> torch.Tensor:
    bias = random_input(1, packed.out_features, x.dtype, seed=9)[0]
    expected = nn.functional.linear(x.double(), packed.unpack().dequantize(torch.float64), bias.double())
    result = run(x, packed, bias, backend)
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    assert error(result, expected) < TOLERANCE[x.dtype]
    assert torch.equal(run(x, packed, bias, backend), result)  # the same bits again
    return result


def module(name: str = "planes-2-col", rows: int = 160, columns: int = 512, **choices) -> ARBLinear:
    weight = random_binarized(LAYOUTS[name], rows, columns, **choices)
    bias = nn.Parameter(torch.randn(rows, generator=torch.Generator().manual_seed(8)), requires_grad=False)
    return ARBLinear.from_binarized(weight, bias).to(DEVICE).half()
