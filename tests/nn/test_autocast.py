"""Packed layers under `torch.autocast`: as `nn.Linear`, whatever the number of rows."""

import pytest
import test_arb_linear
import test_factorized
import test_hadamard_linear
import torch
from layer_checks import dense
from packed_weights import random_binarized, relative_error
from shared_layers import layers, shared
from test_arb_experts import binarized, make
from tiny_experts import routing
from torch import nn

from optimum_arb.nn import compiled as compiled_module
from optimum_arb.nn import packed_linear

BACKENDS = ("auto", "cpu", "reference", "dequantize")
ROWS = (1, 4, 64, 300)
COLUMNS = 300
HALF = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # dtypes, and the error that they cost
KINDS = {
    "planes": lambda backend: test_arb_linear.layer(backend=backend, permuted=True),
    "salient": lambda backend: test_arb_linear.layer("groups-all-salient-col", backend=backend),
    "codes": lambda backend: packed_linear(
        random_binarized(test_arb_linear.LAYOUTS["planes-2-col"], 42, COLUMNS), torch.randn(42), backend, 8
    ),
    "hadamard": test_hadamard_linear.layer,
    "factors": lambda backend: test_factorized.layer(backend=backend),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_a_linear(kind, backend, dtype):
    module, plain = KINDS[kind](backend), nn.Linear(COLUMNS, 42)
    for x in [torch.randn(rows, COLUMNS) for rows in ROWS] + [torch.randn(2, 3, COLUMNS).bfloat16()]:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            result = module(x)
            assert result.dtype == plain(x).dtype == dtype
        assert torch.equal(module(x.to(dtype)), result)  # outside of it
        assert relative_error(result, dense(module, x)) < HALF[dtype]
    assert module(torch.randn(3, COLUMNS)).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "backend"), [("planes", "auto"), ("hadamard", "auto"), ("factors", "auto"), ("planes", "dequantize")]
)
def test_compiled(kind, backend):
    """As not compiled; compiled code notices whether it is called under autocast."""
    module = KINDS[kind](backend)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (1, 64):
        x = torch.randn(rows, COLUMNS)
        for enabled in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                result = compiled(x)
                assert result.dtype == (torch.bfloat16 if enabled else torch.float32)
                assert torch.equal(result, module(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_stays(backend):
    module = test_arb_linear.layer(backend=backend, bias=backend != "dequantize")
    x = torch.randn(20, COLUMNS, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(module(x), dense(module, x)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward(kind, backend):
    """The gradients have the dtypes of what they are of; inside of autocast they are those of outside."""
    module = KINDS[kind](backend).requires_grad_(False)
    module.bias.requires_grad_(True)
    for rows in (3, 64):
        x = torch.randn(rows, COLUMNS, requires_grad=True)
        upstream = torch.randn(rows, 42)
        found = []
        for inside in (False, True):
            x.grad = module.bias.grad = None
            with torch.autocast("cpu", torch.bfloat16):
                result = module(x)
                if inside:
                    result.backward(upstream.bfloat16())
            if not inside:
                result.backward(upstream.bfloat16())
            found.append((x.grad, module.bias.grad))
            assert x.grad.dtype == module.bias.grad.dtype == torch.float32
            assert relative_error(x.grad, upstream @ module.dequantize()) < 1e-2
            assert relative_error(module.bias.grad, upstream.sum(0)) < 1e-2
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_input_on_a_gpus_way_when_compiled(dtype, monkeypatch):
    """A cast is each layer's own: they are not taken for layers of different inputs."""
    torch.compiler.reset()
    monkeypatch.setattr(compiled_module, "on_gpu", lambda x: True)
    found = layers(bias=True)
    together = shared(found)
    module = nn.ModuleList(found)
    compiled = torch.compile(lambda x: [layer(x) for layer in module], fullgraph=True, backend="aot_eager")
    x = torch.randn(2, COLUMNS).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = compiled(x)
    for layer, result in zip(found, results, strict=True):
        assert result.dtype == torch.bfloat16
        assert relative_error(result, dense(layer, x)) < 1e-2
    assert together.enabled
    assert not compiled_module._waiting
    torch.compiler.reset()


def test_layers_of_one_input():
    """What one computed for the others of another input, the cast of an older one, is not handed out."""
    found = layers()
    together = shared(found)
    x = torch.randn(1, COLUMNS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for layer in found:
            assert relative_error(layer(x), dense(layer, x)) < 1e-2
    assert together.enabled
    assert not together._waiting


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["gated", "gpt-oss", "norm"])
def test_experts(form, backend):
    """As the float experts of transformers: the result has the dtype of the input."""
    packed = binarized(make(form))
    packed.backend = backend
    plain = packed.float_module(torch.float32)
    for rows in (1, 40):
        x = torch.randn(rows, 64)
        index, weights = routing(rows, 4)
        expected = plain(x, index, weights)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            result = packed(x, index, weights)
            assert result.dtype == plain(x, index, weights).dtype == torch.float32
        assert 1e-4 < relative_error(result, expected) < 2e-2  # of bfloat16, for any number of rows


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_experts_with_a_float_matrix(only):
    packed = binarized(make("gated"), only)
    x = torch.randn(10, 64)
    index, weights = routing(10, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = packed(x, index, weights)
    assert result.dtype == torch.float32
    assert relative_error(result, packed.float_module(torch.float32)(x, index, weights)) < 2e-2


def test_transforms():
    """Values that no kernel reads by itself, and tensors without values."""
    module, x = test_arb_linear.layer(), torch.randn(5, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(torch.func.vmap(module)(x), module(x)) < 1e-2
        results = torch.func.jvp(module, (x,), (x,))
        assert [result.dtype for result in results] == [torch.bfloat16] * 2
        assert module.to("meta")(x.to("meta")).shape == (5, 42)
