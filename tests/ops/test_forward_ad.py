"""Forward-mode derivatives and transforms: tangents go through the same product, and none is lost without a word."""

from __future__ import annotations

import pytest
import torch
from packed_weights import random_binarized, random_factorized, relative_error
from torch.autograd import forward_ad

from optimum_arb.experts.packing import stack_experts
from optimum_arb.format.hadamard import random_signs
from optimum_arb.format.layout import layout_from_name, planes_layout
from optimum_arb.format.packing import TENSOR_NAMES, pack
from optimum_arb.nn import packed_linear
from optimum_arb.ops import grouped_linear
from optimum_arb.ops.hadamard import hadamard

LAYER_KINDS = ("planes-2", "8 bits", "permuted", "factors", "dequantize")


def layer(kind):
    bias = torch.nn.Parameter(torch.randn(40))
    if kind == "factors":
        return packed_linear(random_factorized(40, 300, 70), bias)
    weight = random_binarized(planes_layout(2), 40, 300, permuted=kind in ("permuted", "hadamard"))
    if kind == "hadamard":
        weight.hadamard, weight.input_signs = 128, random_signs(300, 0)
    backend = kind if kind == "dequantize" else "auto"
    return packed_linear(weight, bias, backend, scale_bits=8 if kind == "8 bits" else 16)


def tangent(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction)))


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_layer(kind, grad):
    module = layer(kind)
    x, direction = torch.randn(2, 3, 300), torch.randn(2, 3, 300)
    with torch.set_grad_enabled(grad):
        expected = module(x)
        found = tangent(module, x, direction)
    assert torch.equal(found.primal, expected)
    assert relative_error(found.tangent, direction @ module.dequantize().T) < 3e-6


def test_without_tangents_a_level_changes_no_bit():
    module = layer("planes-2")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 300).to(dtype)
        expected = module(x)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(module(x))
        assert found.tangent is None
        assert torch.equal(found.primal, expected)


def test_a_bias():
    module = layer("planes-2")
    x, direction = torch.randn(3, 300), torch.randn(40)

    def of_bias(bias):
        return torch.func.functional_call(module, {"bias": bias}, x)

    found = torch.func.jvp(of_bias, (module.bias.detach(),), (direction,))[1]
    assert torch.equal(found, direction.expand(3, 40))
    inputs = (x, module.bias.detach())
    both = torch.func.jvp(
        lambda x, bias: torch.func.functional_call(module, {"bias": bias}, x), inputs, (x.flip(0), direction)
    )[1]
    assert relative_error(both, x.flip(0) @ module.dequantize().T + direction) < 3e-6


@pytest.mark.parametrize("kind", ["planes-2", "factors"])
def test_transforms(kind):
    module = layer(kind)
    weight, x = module.dequantize(), torch.randn(300)
    assert relative_error(torch.func.jacfwd(module)(x), weight) < 3e-6
    found = torch.func.hessian(lambda x: module(x).square().sum())(x)
    assert relative_error(found, 2 * weight.T @ weight) < 3e-5


@pytest.mark.parametrize("kind", [*LAYER_KINDS, "hadamard"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_vmap(kind, grad):
    """One call for all, wherever the mapped dimension is."""
    module = layer(kind)
    x = torch.randn(4, 3, 300)
    with torch.set_grad_enabled(grad):
        expected = module(x)
        for dim in range(3):
            many = torch.func.vmap(module, in_dims=dim)(x.movedim(0, dim).contiguous())
            assert relative_error(many, expected) < 3e-6


def test_vmap_of_biases():
    module, x, biases = layer("planes-2"), torch.randn(3, 300), torch.randn(5, 40)

    def of_bias(bias):
        return torch.func.functional_call(module, {"bias": bias}, x)

    expected = torch.stack([of_bias(bias) for bias in biases])
    assert relative_error(torch.func.vmap(of_bias)(biases), expected) < 3e-6


@pytest.mark.parametrize("kind", [*LAYER_KINDS, "hadamard"])
def test_gradients_of_transforms(kind):
    module = layer(kind)
    weight, x = module.dequantize(), torch.randn(5, 300)

    def total(x):
        return module(x).sum()

    expected = weight.sum(0)
    assert relative_error(torch.func.grad(total)(x[0]), expected) < 3e-6
    assert relative_error(torch.func.jacrev(module)(x[0]), weight) < 3e-6
    assert relative_error(torch.func.vmap(torch.func.grad(total))(x), expected.expand(5, 300)) < 3e-6

    def detached(x):
        with torch.no_grad():
            return x.sum() + module(x).sum()

    assert not torch.func.grad(detached)(x[0]).any()


def test_gradients_of_tangents():
    module = layer("planes-2")
    x, direction = torch.randn(3, 300, requires_grad=True), torch.randn(3, 300, requires_grad=True)
    found = tangent(module, x, direction)
    (grad,) = torch.autograd.grad(found.tangent.sum(), direction, retain_graph=True)
    assert relative_error(grad, module.dequantize().sum(0).expand(3, 300)) < 3e-6
    x_grad, bias_grad = torch.autograd.grad(found.primal.sum(), (x, module.bias))
    assert relative_error(x_grad, module.dequantize().sum(0).expand(3, 300)) < 3e-6
    assert torch.equal(bias_grad, torch.full((40,), 3.0))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_hadamard_transform(inverse):
    sign = torch.randn(300).sign()
    order = torch.randperm(300)[None].to(torch.int32)
    x, direction = torch.randn(3, 300), torch.randn(3, 300)

    def change(x):
        return hadamard(x, sign, order, block=128, inverse=inverse)

    found = tangent(change, x, direction)
    assert torch.equal(found.primal, change(x))
    assert torch.equal(found.tangent, change(direction))


def test_experts():
    layout = layout_from_name("planes-1-col")
    weights = [random_binarized(layout, 40, 300, seed=seed) for seed in range(3)]
    tensors = stack_experts([[pack(weight)] for weight in weights])
    offsets = torch.tensor([2, 2, 5])
    x, direction = torch.randn(5, 300), torch.randn(5, 300)

    def product(x):
        packed = {name: tensors.get(name) for name in TENSOR_NAMES}
        return grouped_linear(x, offsets, **packed, layout=layout.name, block_size=128)

    found = tangent(product, x, direction)
    assert torch.equal(found.primal, product(x))
    assert torch.equal(found.tangent, product(direction))
    assert found.tangent.any()
