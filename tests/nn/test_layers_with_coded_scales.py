"""Layers whose scales are stored in 8 bits: the same operator, the same answers, fewer bytes."""

import pytest
import torch
from accelerate import cpu_offload
from layer_checks import copies, dense
from packed_weights import random_binarized, random_factorized, relative_error
from torch import nn

from optimum_arb.format.factors import unpack_factors
from optimum_arb.format.layout import planes_layout
from optimum_arb.format.packing import stored_bytes, unpack
from optimum_arb.nn import ARBFactorizedLinear, ARBLinear, packed_linear, share_inputs

KINDS = ("planes-2-col", "planes-1", "factors")


def layer(kind: str, seed: int = 0, rows: int = 42, **choices) -> ARBLinear:
    if kind == "factors":
        weight = random_factorized(rows, 300, 70, seed)
    else:
        weight = random_binarized(planes_layout(int(kind[7]), col_scale="col" in kind), rows, 300, seed=seed)
    return packed_linear(weight, torch.randn(rows), scale_bits=8, **choices)


def empty(kind: str, device: str) -> ARBLinear:
    if kind == "factors":
        return ARBFactorizedLinear(300, 42, 70, bias=True, dtype=torch.float32, device=device, scale_bits=8)
    layout = planes_layout(int(kind[7]), col_scale="col" in kind)
    return ARBLinear(300, 42, layout, 128, bias=True, permuted=False, dtype=torch.float32, device=device, scale_bits=8)


@pytest.mark.parametrize("backend", ["auto", "reference", "dequantize"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient(kind, backend):
    module = layer(kind, backend=backend)
    x = torch.randn(2, 3, 300, requires_grad=True)
    result = module(x)
    assert relative_error(result, dense(module, x)) < 3e-6
    result.sum().backward()
    assert relative_error(x.grad, module.dequantize().sum(0).expand(2, 3, 300)) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored(kind):
    module = layer(kind)
    tensors = module.packed()
    assert module.bits_per_weight() == stored_bytes(tensors) * 8 / (42 * 300)
    names = {"weight" if name == "weight" else f"weight_{name}" for name in tensors}
    assert set(module.state_dict()) == {*names, "bias"}
    for name, tensor in tensors.items():
        if name.endswith("scale"):
            assert tensor.dtype == torch.uint8
            assert module.taken(name).dtype == torch.float16
    unpacked = (
        unpack_factors(tensors, 300) if kind == "factors" else unpack(tensors, module.layout, 300, module.block_size)
    )
    assert torch.equal(unpacked.dequantize(), module.dequantize())
    assert torch.equal(unpacked.row_scale.flatten(), module.operand("row_scale").flatten())
    assert all(not parameter.requires_grad for name, parameter in module.named_parameters() if name != "bias")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, device):
    module, new = layer(kind), empty(kind, device)
    for key, tensor in new.state_dict().items():
        assert (tensor.shape, tensor.dtype) == (module.state_dict()[key].shape, module.state_dict()[key].dtype)
    new.load_state_dict(module.state_dict(), assign=device == "meta")
    x = torch.randn(3, 300)
    compiled = torch.compile(new, fullgraph=True, backend="eager")  # which cannot look whether codes have changed
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(new(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_moves(kind):
    module = layer(kind)
    x = torch.randn(3, 300)
    expected = module(x)
    for copied in copies(module):
        assert torch.equal(copied(x), expected)
        copied.weight_row_scale.data.fill_(0)
        copied.decode_stored()
        assert torch.equal(copied(x), copied.bias.expand(3, 42))
    assert torch.equal(module(x), expected)
    module.to(torch.bfloat16)
    assert all(tensor.dtype == torch.float16 for tensor in module.buffers())
    assert relative_error(module(x), expected) < 1e-2  # of the bias alone
    assert all(tensor.is_meta for tensor in module.to("meta").buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_changed_codes_are_noticed(kind):
    module, other = layer(kind), layer(kind, seed=5)
    x = torch.randn(3, 300)
    module(x)
    with torch.no_grad():
        for name, tensor in other.packed().items():
            module.get_parameter("weight" if name == "weight" else f"weight_{name}").copy_(tensor)
    assert relative_error(module(x) - module.bias, other(x) - other.bias) < 1e-5
    with torch.no_grad():
        module.weight_scale_grid[0, 0] += 1  # twice the first scale
    assert module._codes() != module._decoded_from
    result = module(x) - module.bias
    if kind != "planes-2-col":
        assert relative_error(result, 2 * (other(x) - other.bias)) < 1e-5
    module.weight_row_scale = nn.Parameter(torch.zeros_like(module.weight_row_scale), requires_grad=False)
    assert torch.equal(module(x), module.bias.expand(3, 42))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_written_by_way_of_data_count_once_they_are_decoded(kind):
    """Such a write counts no version of the tensor: the docstring says what to call."""
    module, other = layer(kind), layer(kind, seed=5)
    x = torch.randn(3, 300)
    module(x)
    for name, tensor in other.packed().items():
        module.get_parameter("weight" if name == "weight" else f"weight_{name}").data.copy_(tensor)
    module.decode_stored()
    assert relative_error(module(x) - module.bias, other(x) - other.bias) < 1e-5


def test_offloaded():
    module = layer("planes-2-col")
    x = torch.randn(3, 300)
    expected = module(x)
    cpu_offload(module, execution_device="cpu")
    assert module.weight.is_meta
    assert torch.equal(module(x), expected)


def test_inference_mode_and_a_gradient_later():
    with torch.inference_mode():
        module = layer("planes-2-col")
        x = torch.randn(3, 300)
        expected = module(x)
    assert not any(tensor.is_inference() for tensor in module.buffers())
    assert torch.equal(module(x.clone()), expected)


def test_share_inputs():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = layer("planes-2-col"), layer("planes-2-col", 1, rows=20)

    model = Mlp()
    assert share_inputs(model) == 1
    x = torch.randn(1, 300)
    together = model.gate_proj.shared_input
    for each in (model.gate_proj, model.up_proj):
        assert torch.equal(together.output(each, x), each(x))


def test_scales_too_small_for_codes():
    weight = random_binarized(planes_layout(1, col_scale=True), 8, 300)
    weight.row_scale *= 1e-6
    module = packed_linear(weight, scale_bits=8)
    assert module.weight_row_scale.dtype == torch.float32
    assert [name for name, _ in module.named_buffers()] == ["decoded_col_scale"]
    x = torch.randn(3, 300)
    assert relative_error(module(x), x.double() @ module.dequantize(torch.float64).T) < 3e-6
