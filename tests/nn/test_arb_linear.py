"""`ARBLinear` as a module."""

import pytest
import torch
from layer_checks import compiles_as_one_graph, copies, dense, gradient_reaches_input_and_bias_alone
from packed_weights import random_binarized, relative_error
from torch import nn

from optimum_arb.format.layout import all_layouts
from optimum_arb.nn import ARBLinear

LAYOUTS = {layout.name: layout for layout in all_layouts()}
BACKENDS = ("auto", "cpu", "reference", "dequantize")


def layer(name="planes-2-col", rows=42, columns=300, backend="auto", bias=True, **choices) -> ARBLinear:
    weight = random_binarized(LAYOUTS[name], rows, columns, **choices)
    return ARBLinear.from_binarized(weight, nn.Parameter(torch.randn(rows)) if bias else None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_output(name, backend):
    module = layer(name, permuted=True, backend=backend)
    for m in (1, 20):
        x = torch.randn(2, m, 300)
        assert relative_error(module(x), dense(module, x)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_model(dtype, tolerance, backend):
    module = layer("groups-all-salient-col", backend=backend)
    x = torch.randn(3, 300).to(dtype)
    expected = dense(module, x)
    packed = {name: tensor.clone() for name, tensor in module.packed().items()}
    module.to(dtype)
    assert module.weight.dtype == torch.uint8
    assert module.weight_salient_columns.dtype == torch.int16
    for name, tensor in module.packed().items():  # scales too: they would lose digits
        assert tensor.dtype == packed[name].dtype
        assert torch.equal(tensor, packed[name])
    assert module.bias.dtype == dtype
    result = module(x)
    assert result.dtype == dtype
    assert relative_error(result, expected) < tolerance


def test_repr_shows_what_it_is():
    # stored: 2 x 38 bytes of planes and 3 x 2 scales a row, 2 scales a column
    bits = (42 * 2 * 38 + 2 * 42 * 6 + 2 * 2 * 300) * 8 / (42 * 300)
    assert repr(layer(bias=False)) == (
        "ARBLinear(in_features=300, out_features=42, bias=False, layout=planes-2-col, block_size=128, "
        f"bits_per_weight={bits:.3f}, backend=auto)"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(backend):
    module = layer(backend=backend)
    x = torch.randn(3, 300)
    expected = module(x)
    for copied in copies(module):
        assert copied.__dict__["_dequantized"] is None
        assert torch.equal(copied(x), expected)
        copied.weight.data.bitwise_not_()
        copied._drop_dequantized()
        assert not torch.equal(copied(x), expected)
    assert torch.equal(module(x), expected)


def test_dequantized_copy_is_kept_and_dropped():
    module = layer(backend="dequantize")
    x = torch.randn(3, 300)
    module(x)
    kept = module._dequantized
    module(x)
    assert module._dequantized is kept
    assert set(module.state_dict()) == {"weight", "weight_row_scale", "weight_col_scale", "bias"}
    assert module(x.bfloat16().float()).dtype == torch.float32

    other = layer(backend="reference", seed=5)
    module.load_state_dict(other.state_dict())  # written in place
    assert relative_error(module(x), other(x)) < 2e-6
    module.weight_row_scale = nn.Parameter(other.weight_row_scale * 2, requires_grad=False)  # replaced
    assert relative_error(module(x) - module.bias, (other(x) - module.bias) * 2) < 2e-6
    with torch.no_grad():
        module.weight_row_scale.mul_(0.5)  # written in place, nobody told
    assert relative_error(module(x), other(x)) < 2e-6
    module.to(torch.bfloat16)
    assert module._dequantized is None
    assert module(x.bfloat16()).dtype == torch.bfloat16
    module.backend = "reference"
    assert module(x).dtype == torch.float32


def test_inference_mode():
    with torch.inference_mode():
        module = layer(backend="dequantize")
        x = torch.randn(3, 300)
        assert relative_error(module(x), dense(module, x)) < 2e-6
        assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_input_and_bias_alone(backend):
    gradient_reaches_input_and_bias_alone(layer(backend=backend), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_can_be_written_in_place(backend):
    """As PEFT does where a batch mixes several adapters."""
    module = layer(backend=backend)
    x = torch.randn(2, 3, 300, requires_grad=True)
    output = module(x)
    output[[0]] += 1
    output.sum().backward()
    assert relative_error(x.grad, module.dequantize().sum(0).expand(2, 3, 300)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["planes-1-col", "groups-non-salient-salient-mean"])
def test_compiles_as_one_graph(name, backend):
    compiles_as_one_graph(layer(name, permuted=True, backend=backend), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype):
    torch.compiler.reset()
    module = nn.Sequential(layer("planes-1-col"), nn.SiLU(), layer("planes-2-col", rows=30, columns=42)).to(dtype)
    compiled = torch.compile(module, fullgraph=True)
    for shape in ((1, 300), (20, 300)):
        x = torch.randn(shape).to(dtype)
        assert relative_error(compiled(x), module(x)) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_after_inference_mode(backend):
    module = layer(backend=backend)
    with torch.inference_mode():
        module(torch.randn(3, 300))
    gradient_reaches_input_and_bias_alone(module, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_gradient(backend):
    module = layer(backend=backend, permuted=True)
    x = torch.randn(3, 300, requires_grad=True)
    upstream = torch.randn(3, 42, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x), x, upstream, create_graph=True)
    direction = torch.randn(3, 300)
    (found,) = torch.autograd.grad(grad, upstream, direction)
    assert relative_error(found, direction @ module.dequantize().T) < 2e-6
