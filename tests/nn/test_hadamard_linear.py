"""Layers whose input goes through a block Hadamard transform."""

import copy

import pytest
import torch
from attention_layers import Attention
from layer_checks import compiles_as_one_graph, dense
from packed_weights import random_binarized, relative_error

from optimum_arb.format.hadamard import random_signs
from optimum_arb.format.layout import planes_layout
from optimum_arb.format.packing import pack, packed_shapes, stored_bytes, unpack
from optimum_arb.nn import ARBLinear, packed_linear, share_inputs

BACKENDS = ("auto", "cpu", "reference", "dequantize")
LAYOUT = planes_layout(2, col_scale=True)


def weight_of(rows=42, columns=300, block=128, permuted=True, seed=0, signs=1):
    weight = random_binarized(LAYOUT, rows, columns, permuted=permuted, seed=seed)
    if permuted:
        weight.permutation = torch.randperm(columns, generator=torch.Generator().manual_seed(9))
    weight.hadamard, weight.input_signs = block, random_signs(columns, signs)
    return weight


def layer(backend="auto", bias=True, scale_bits=16, **choices) -> ARBLinear:
    weight = weight_of(**choices)
    return packed_linear(weight, torch.randn(weight.shape[0]) if bias else None, backend, scale_bits)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("columns", "block"), [(300, 128), (576, 256), (64, 64)])
def test_packed_form(columns, block, permuted):
    weight = weight_of(columns=columns, block=block, permuted=permuted)
    packed = pack(weight)
    shapes = packed_shapes(LAYOUT, 42, columns, 128, permuted, hadamard=block)
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == shapes
    found = unpack(packed, LAYOUT, columns, 128, block)
    assert torch.equal(found.input_signs, weight.input_signs)
    assert relative_error(found.dequantize(), weight.dequantize()) < 2e-3
    with pytest.raises(ValueError, match="input_signs cannot be unpacked with hadamard=0"):
        unpack(packed, LAYOUT, columns, 128)
    del packed["input_signs"]
    with pytest.raises(ValueError, match="cannot be unpacked with hadamard"):
        unpack(packed, LAYOUT, columns, 128, block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("columns", "block"), [(300, 128), (576, 256)])
def test_output_and_gradient(columns, block, permuted, backend):
    module = layer(backend, columns=columns, block=block, permuted=permuted)
    for m in (1, 20):
        x = torch.randn(2, m, columns, requires_grad=True)
        result = module(x)
        assert relative_error(result, dense(module, x)) < 3e-6
        result.sum().backward()
        assert relative_error(x.grad, module.dequantize().sum(0).expand(x.shape)) < 3e-6
        with torch.no_grad():
            assert relative_error(module(x), result) < 3e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)]
)
def test_dtypes(dtype, tolerance):
    module = layer()
    x = torch.randn(3, 300).to(dtype)
    expected = dense(module, x)
    module.to(dtype)
    assert module.decoded_input_signs.dtype == torch.int8
    result = module(x)
    assert result.dtype == dtype
    assert relative_error(result, expected) < tolerance


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_what_is_stored(scale_bits):
    module = layer(scale_bits=scale_bits, bias=False)
    assert module.weight_input_signs.shape == (1, 38)
    assert module.bits_per_weight() == stored_bytes(module.packed()) * 8 / (42 * 300)
    assert "weight_input_signs" in module.state_dict()
    assert not any("decoded" in name for name in module.state_dict())
    assert "layout=planes-2-col-hadamard-128" in repr(module)
    choices = {"bias": False, "permuted": True, "scale_bits": scale_bits, "hadamard": 128}
    x = torch.randn(3, 300)
    for device in ("cpu", "meta"):
        empty = ARBLinear(300, 42, LAYOUT, 128, device=device, **choices)
        empty.load_state_dict(module.state_dict(), assign=device == "meta")
        assert torch.equal(empty(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    compiles_as_one_graph(layer(backend), 3e-6)


def test_transformed_once_for_all(monkeypatch):
    model = Attention([layer(rows=rows, seed=rows) for rows in (42, 7, 16)])
    expected = model(torch.ones(2, 300))
    assert share_inputs(model) == 1
    calls = []
    kind = type(model.q_proj.input_transform())
    original = kind.apply
    monkeypatch.setattr(kind, "apply", lambda self, x: calls.append(1) or original(self, x))
    with torch.no_grad():
        for count in (1, 2):
            x = torch.ones(2, 300)
            assert torch.equal(model(x), expected)
            assert len(calls) == count
        together = model.q_proj.shared_input
        assert not together._transformed  # nothing is kept when all have had it
        x = torch.randn(1, 300)
        for each in (model.q_proj, model.k_proj, model.v_proj):
            assert torch.equal(together.output(each, x), each(x))  # the kernel for few tokens, in plain torch here
    calls.clear()
    model(torch.randn(2, 300, requires_grad=True)).sum().backward()
    assert len(calls) == 3


def test_an_input_that_is_written_is_transformed_again():
    model = Attention([layer(rows=rows, seed=rows) for rows in (42, 7, 16)])
    x = torch.randn(2, 300)
    expected = model.k_proj(x + 1)
    assert share_inputs(model) == 1
    with torch.no_grad():
        model.q_proj(x)
        x.add_(1)
        assert torch.equal(model.k_proj(x), expected)


def test_an_input_of_inference_mode_that_is_written_is_transformed_again():
    model = Attention([layer(rows=rows, seed=rows) for rows in (42, 7, 16)])
    assert share_inputs(model) == 1
    with torch.inference_mode():
        x = torch.randn(2, 300)
        model.q_proj(x)
        x.add_(1)
        assert relative_error(model.k_proj(x), dense(model.k_proj, x)) < 3e-6


def test_an_order_of_columns_that_is_written_is_seen():
    model = Attention([layer(rows=rows, seed=rows) for rows in (42, 7, 16)])
    assert share_inputs(model) == 1
    x = torch.randn(2, 300)
    with torch.no_grad():
        for module in model.children():
            module(x)
        order = model.k_proj.weight_permutation
        order.copy_(order.flip(1))
        model.q_proj(x)
        assert relative_error(model.k_proj(x), dense(model.k_proj, x)) < 3e-6


def test_other_signs_are_not_shared():
    found = [layer(rows=rows, seed=rows) for rows in (42, 7)]
    assert share_inputs(Attention([*found, layer(rows=16, signs=2)])) == 0
    assert share_inputs(Attention([*found, layer(rows=16, block=64)])) == 0
    assert share_inputs(Attention([*found, layer(rows=16, permuted=False)])) == 0
    model = Attention([*found, layer(rows=16)])
    assert share_inputs(model) == 1
    x = torch.randn(2, 300)
    with torch.no_grad():
        model(x)
        other = layer(rows=16, signs=2)
        model.v_proj.load_state_dict(other.state_dict())
        assert torch.equal(model(x)[:, 49:], other(x))
    assert not model.q_proj.shared_input.enabled
