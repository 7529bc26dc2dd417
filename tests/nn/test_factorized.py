"""`ARBFactorizedLinear` as a module."""

import copy
import gc
import weakref

import pytest
import torch
from attention_layers import Attention
from layer_checks import compiles_as_one_graph, copies, dense, gradient_reaches_input_and_bias_alone
from packed_weights import random_binarized, random_factorized, relative_error
from torch import nn

from optimum_arb.format.factors import FACTOR_TENSOR_NAMES, FactorizedWeight, pack_factors
from optimum_arb.format.layout import planes_layout
from optimum_arb.format.packing import stored_bytes
from optimum_arb.nn import ARBFactorizedLinear, ARBLinear, packed_linear, share_inputs

BACKENDS = ("auto", "cpu", "reference", "dequantize")


def layer(rows=42, columns=300, rank=70, backend="auto", bias=True, seed=0) -> ARBFactorizedLinear:
    weight = random_factorized(rows, columns, rank, seed)
    return ARBFactorizedLinear.from_factorized(weight, nn.Parameter(torch.randn(rows)) if bias else None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(42, 300, 70), (20, 64, 129), (5, 7, 1), (128, 256, 128)])
def test_output(rows, columns, rank, backend):
    module = layer(rows, columns, rank, backend)
    for m in (1, 20):
        x = torch.randn(2, m, columns)
        result = module(x)
        assert result.shape == (2, m, rows)
        assert relative_error(result, dense(module, x)) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-12)]
)
def test_other_dtypes(dtype, tolerance, backend):
    module = layer(backend=backend)
    packed = {name: tensor.clone() for name, tensor in module.packed().items()}
    x = torch.randn(3, 300).to(dtype)
    expected = dense(module, x)
    module.to(dtype)
    for name, tensor in module.packed().items():
        assert tensor.dtype == packed[name].dtype
        assert torch.equal(tensor, packed[name])
    result = module(x)
    assert result.dtype == dtype
    assert relative_error(result, expected) < tolerance


def test_large_outputs_stay_within_float16():
    """Outputs up to a tenth of float16's range: what lies between has the same range, wherever the method left it."""
    weight = random_factorized(64, 256, 128)
    weight.rank_scale *= 2e4
    weight.col_scale /= 2e4 / 300
    module = packed_linear(weight)
    x = torch.randn(4, 256).half()
    expected = dense(module, x)
    assert 100 < float(expected.abs().max()) < 6e4
    assert relative_error(module(x), expected) < 4e-3


def test_is_a_linear_with_packed_parameters():
    module = layer()
    assert isinstance(module, ARBLinear)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features, module.rank) == (300, 42, 70)
    expected = pack_factors(random_factorized(42, 300, 70))
    assert tuple(module.packed()) == FACTOR_TENSOR_NAMES[:-1]
    names = {"weight" if name == "weight" else f"weight_{name}": tensor for name, tensor in expected.items()}
    assert set(dict(module.named_parameters())) == {*names, "bias"}
    for name, tensor in names.items():
        parameter = getattr(module, name)
        assert torch.equal(parameter, tensor)
        assert parameter.dim() == 2
        assert not parameter.requires_grad
    assert not list(module.buffers())
    assert not list(module.children())
    assert module.bits_per_weight() == stored_bytes(expected) * 8 / (42 * 300)
    assert isinstance(module.factorized(), FactorizedWeight)
    assert torch.equal(module.factorized().dequantize(), module.dequantize())
    with pytest.raises(TypeError, match=r"product of two sign matrices: unpack it with factorized\(\)"):
        module.binarized()
    assert "rank=70, bias=True, layout=factors, bits_per_weight=" in repr(module)


def test_the_layer_of_a_weight():
    assert type(packed_linear(random_factorized(4, 16, 3))) is ARBFactorizedLinear
    planes = packed_linear(random_binarized(planes_layout(1), 4, 16), torch.ones(4), "reference")
    assert type(planes) is ARBLinear
    assert planes.backend == "reference"
    assert torch.equal(planes.bias, torch.ones(4))
    with pytest.raises(ValueError, match="rank=0 is no rank"):
        ARBFactorizedLinear(8, 8, 0, bias=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_dict_round_trip(device):
    module = layer()
    empty = ARBFactorizedLinear(300, 42, 70, bias=True, dtype=torch.float32, device=device)
    for key, tensor in empty.state_dict().items():
        assert (tensor.shape, tensor.dtype) == (module.state_dict()[key].shape, module.state_dict()[key].dtype)
    empty.load_state_dict(module.state_dict(), assign=device == "meta")
    x = torch.randn(3, 300)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(backend):
    module = layer(backend=backend)
    x = torch.randn(3, 300)
    expected = module(x)
    for copied in copies(module):
        assert copied.first_product.layer is copied
        assert torch.equal(copied(x), expected)
        copied.weight_inner.data.bitwise_not_()
        copied._drop_dequantized()
        assert not torch.equal(copied(x), expected)
    assert torch.equal(module(x), expected)


def test_memory_is_free_once_a_layer_is_let_go_of():
    """Not when Python looks for cycles of references the next time."""
    model = Attention([layer(rows, rank=8, seed=rows) for rows in (42, 7, 16)])
    share_inputs(model)
    x = torch.randn(1, 300)
    for module in model.children():
        module(x)
    left = [weakref.ref(each) for module in model.children() for each in (module, module.weight_inner)]
    gc.disable()
    try:
        del model, module
        assert all(each() is None for each in left)
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_input_and_bias_alone(backend):
    gradient_reaches_input_and_bias_alone(layer(backend=backend), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    compiles_as_one_graph(layer(backend=backend), 3e-6)


def test_changes_are_noticed():
    module = layer(backend="dequantize")
    x = torch.randn(3, 300)
    module(x)
    other = layer(seed=5, bias=False)
    module.load_state_dict(other.state_dict(), strict=False)
    assert relative_error(module(x) - module.bias, other(x)) < 3e-6
    with torch.no_grad():
        module.weight_inner_row_scale.mul_(2)
    assert relative_error(module(x) - module.bias, 2 * other(x)) < 3e-6


def test_inner_products_share_their_input():
    """The outer ones, biases and all, are each layer's own; ranks may differ, as the rows of query and key do."""
    found = [layer(rows, rank=rank, seed=rank) for rows, rank in ((42, 30), (7, 8), (16, 17))]
    model = Attention(found)
    assert share_inputs(model) == 1
    together = found[0].first_product.shared_input
    assert together.layers == [one.first_product for one in found]
    assert all(one.shared_input is None for one in found)
    x = torch.randn(1, 300)
    for one in found:
        inner = together.output(one.first_product, x)
        assert inner.shape == (1, one.rank)
        assert torch.equal(inner, one.first_product._product(x))
    found[1].weight_inner_row_scale = nn.Parameter(found[1].weight_inner_row_scale * 2, requires_grad=False)
    assert not together._waiting
    copied = copy.deepcopy(model)
    assert copied.q_proj.first_product.shared_input is None
    # of factors and planes only the factors' first products go together
    model = Attention([*found[:2], packed_linear(random_binarized(planes_layout(1, col_scale=True), 16, 300))])
    assert share_inputs(model) == 0
