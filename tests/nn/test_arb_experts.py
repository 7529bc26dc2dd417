"""`ARBExperts` against the float module that it stands for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from packed_weights import relative_error
from tiny_experts import experts_of, other_experts, routing

from optimum_arb import ARBConfig, ARBExperts, ARBLinear
from optimum_arb.experts.conversion import binarize_matrix
from optimum_arb.experts.matrices import expert_matrices, is_experts

FORMS = {
    "gated": lambda: experts_of("MixtralForCausalLM"),
    "gpt-oss": lambda: experts_of("GptOssForCausalLM"),
    "no-gate": lambda: other_experts("no-gate"),
    "transposed": lambda: other_experts("transposed"),
    "norm": lambda: other_experts("norm"),
}


def make(form: str):
    try:
        module = FORMS[form]()
    except ImportError:
        pytest.skip(f"this version of transformers has no experts of the form {form!r}")
    module.config._experts_implementation = "eager"
    return module


def binarized(module, only=None, **choices) -> ARBExperts:
    config = ARBConfig(**{"dataset": None, "block_size": 64, "method": "rtn", **choices})
    packed = ARBExperts(module)
    for name, matrix in expert_matrices(module).items():
        if only in (None, name):
            binarize_matrix(name, matrix, module.get_parameter(name).detach(), config, packed)
    return packed


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_that_of_the_dequantized_module(form):
    module = make(form)
    assert is_experts(module)
    packed = binarized(module)
    plain = packed.float_module(torch.float64)
    assert type(plain) is type(module)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    x = torch.randn(10, 64)
    index, weights = routing(10, 4)
    expected = plain(x.double(), index, weights.double())
    assert expected.abs().max() > 0.01
    for backend in ("auto", "reference", "cpu", "dequantize"):
        packed.backend = backend
        result = packed(x, index, weights)
        assert result.dtype == torch.float32
        assert relative_error(result, expected) < 1e-5
    result = packed(x.bfloat16(), index, weights.bfloat16())
    assert result.dtype == torch.bfloat16
    assert relative_error(result, expected) < 5e-2


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    packed = binarized(make(form))
    plain = packed.float_module(torch.float64)
    index, weights = routing(6, 4)
    inputs = [torch.randn(6, 64, dtype=torch.float64), weights.double()]
    grads = []
    for module in (packed.double(), plain):
        x, w = (value.clone().requires_grad_() for value in inputs)
        module(x, index, w).square().sum().backward()
        grads.append((x.grad, w.grad, *(p.grad for n, p in module.named_parameters() if n.endswith("_bias"))))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for n, p in packed.named_parameters() if n in packed.packed_names())


def test_an_expert_is_a_linear():
    module = make("gated")
    packed = binarized(module, method="arb-hrc")
    assert packed.packed("gate_up_proj")["weight"].shape == (4, 192, 8)
    for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        for expert in range(4):
            x = torch.randn(3, packed.forms[name].in_features)
            outputs = []
            for part in range(parts):
                linear = ARBLinear.from_binarized(packed.binarized(name, expert, part))
                tensors = packed.packed(name)
                for key, tensor in linear.packed().items():
                    assert torch.equal(tensors[key][expert].chunk(parts)[part], tensor)
                outputs.append(linear(x))
            dense = packed.dequantize(name)[expert]
            assert relative_error(torch.cat(outputs, 1), x @ dense.T) < 1e-5


def test_numbers_past_the_last_expert_stand_for_none():
    packed = binarized(make("gpt-oss"))
    x = torch.randn(5, 64)
    index, weights = routing(5, 4)
    index[2, 0], index[3] = 4, 4
    without = weights.clone()
    without[2, 0], without[3] = 0, 0
    expected = packed(x, index.clamp(max=3), without)
    result = packed(x, index, weights)
    torch.testing.assert_close(result, expected)
    assert not result[3].any()


def test_experts_that_no_token_reached_are_not_computed():
    packed = binarized(make("gated"))
    index = torch.tensor([[0, 2], [2, 0]])
    _, weights = routing(2, 4)
    x = torch.randn(2, 64)
    expected = packed(x, index, weights)
    packed.gate_up_proj_row_scale.data[[1, 3]] = torch.nan
    assert torch.equal(packed(x, index, weights), expected)


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("form", ["gated", "gpt-oss"])
def test_one_matrix_may_stay_in_float(form, only):
    module = make(form)
    packed = binarized(module, only)
    other = ({"gate_up_proj", "down_proj"} - {only}).pop()
    assert torch.equal(packed.get_parameter(other), module.get_parameter(other))
    x = torch.randn(10, 64)
    index, weights = routing(10, 4)
    result = packed(x, index, weights)
    assert relative_error(result, packed.float_module(torch.float32)(x, index, weights)) < 1e-5


def test_the_dequantized_copy_follows_the_weights():
    packed = binarized(make("gated"))
    packed.backend = "dequantize"
    index, weights = routing(4, 4)
    x = torch.randn(4, 64)
    before = packed(x, index, weights)
    assert packed._dequantized is not None
    packed.down_proj_row_scale.mul_(2)
    torch.testing.assert_close(packed(x, index, weights), 2 * before)
    assert set(packed.state_dict()) == {"gate_up_proj", "gate_up_proj_row_scale", "down_proj", "down_proj_row_scale"}
    assert pickle.loads(pickle.dumps(packed))._dequantized is None
    packed.load_state_dict(packed.state_dict())
    assert packed._dequantized is None


def test_copies_are_independent():
    packed = binarized(make("gpt-oss"))
    index, weights = routing(4, 4)
    x = torch.randn(4, 64)
    expected = packed(x, index, weights)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x, index, weights), expected)
        other.down_proj_row_scale.data.zero_()
    assert torch.equal(packed(x, index, weights), expected)


def test_compiles_without_graph_breaks():
    packed = binarized(make("gated"))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 8):
        index, weights = routing(tokens, 4, seed=tokens)
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x, index, weights), packed(x, index, weights))


def test_bits_and_description():
    packed = binarized(make("gated"))
    # 8 bytes of signs and one float16 scale for 64 columns; 12 and two for 96
    assert packed.bits_per_weight("gate_up_proj") == 8 * (8 + 2) / 64
    assert packed.bits_per_weight("down_proj") == 8 * (12 + 4) / 96
    assert "MixtralExperts, experts=4, gate_up_proj=(192, 64, planes-1, bits_per_weight=1.250)" in repr(packed)


def test_gradient_after_inference_mode():
    packed = binarized(make("no-gate"))
    packed.backend = "dequantize"
    hidden = torch.randn(5, packed.float_matrices["down_proj"].out_features, requires_grad=True)
    index, weights = routing(5, 4)
    with torch.inference_mode():
        packed(hidden, index, weights)
    packed(hidden, index, weights).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("backend", ["auto", "dequantize"])
def test_biases_and_children_are_trained(backend):
    for form, trained in (("gpt-oss", "down_proj_bias"), ("norm", "post_expert_norm.weight")):
        packed = binarized(make(form))
        packed.backend = backend
        packed.get_parameter(trained).requires_grad_(True)
        index, weights = routing(5, 4)
        packed(torch.randn(5, packed.float_matrices["down_proj"].out_features), index, weights).sum().backward()
        assert packed.get_parameter(trained).grad is not None


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_tokens(backend):
    packed = binarized(make("gated"))
    packed.backend = backend
    hidden = packed.float_matrices["down_proj"].out_features
    index, weights = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
    assert packed(torch.randn(0, hidden), index, weights).shape == (0, hidden)
