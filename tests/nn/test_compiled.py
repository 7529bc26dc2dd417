"""Compiled packed layers on the way of a GPU: how little torch looks at before a call, and that it sees changes."""

import copy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packed_weights import random_binarized, random_factorized
from shared_layers import LAYOUTS, Attention
from torch import nn
from torch._dynamo import guards

from optimum_arb.format.hadamard import random_signs
from optimum_arb.nn import ARBLinear, compiled, packed_linear, share_inputs

# kinds, while dicts are unchanged; torch 2.15 looks once at a class whose `forward` is one of its bases'
SKIPPED = (nn.Module, dict, tuple, str, int, types.NoneType, torch.Tensor, type)


class Block(Attention):
    """Three layers of one input and one of another."""

    def __init__(self, found):
        super().__init__(found[:3])
        self.o_proj = found[3]

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + self.k_proj(x) * self.v_proj(x))


def packed(kind: str, seed: int) -> ARBLinear:
    """128 x 128."""
    if kind == "factors":
        return packed_linear(random_factorized(128, 128, 64, seed))
    layout = LAYOUTS["groups-all-salient-col" if kind == "salient" else "planes-2-col"]
    weight = random_binarized(layout, 128, 128, permuted=kind == "permuted", seed=seed)
    if kind == "hadamard":
        weight.hadamard, weight.input_signs = 64, random_signs(128, 1)
    bias = torch.randn(128, generator=torch.Generator().manual_seed(seed)) if kind == "bias" else None
    return packed_linear(weight, bias, scale_bits=8 if kind == "codes" else 16)


def block(kind: str = "plain", seed: int = 0) -> Block:
    model = Block([packed(kind, seed + i) for i in range(4)])
    assert share_inputs(model) == 1
    return model.requires_grad_(False)


def compiling(model: nn.Module):
    """The compiled model, and the operators of each graph that it was compiled to."""
    graphs: list[list[str]] = []

    def backend(module, inputs):
        names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        graphs.append([name.split(".")[-1] for name in names if "optimum_arb" in name])
        return module.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def tokens(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 128).half()


@pytest.fixture
def managers(monkeypatch):
    """The roots of the guards of what is compiled."""
    found: list[Any] = []
    original = guards.CheckFunctionManager.__init__

    def keep(self, *args, **kwargs):
        original(self, *args, **kwargs)
        found.append(self.guard_manager.root)

    monkeypatch.setattr(guards.CheckFunctionManager, "__init__", keep)
    return found


def nodes(manager: Any) -> Iterator[Any]:
    yield manager
    if hasattr(manager, "get_key_value_managers"):
        children = [each for pair in manager.get_key_value_managers().values() for each in pair if each is not None]
    else:
        children = manager.get_child_managers()
    for child in children:
        yield from nodes(child)


KINDS = {
    "plain": ["shared_input_linear", "linear"],
    "permuted": ["shared_input_linear", "linear"],
    "salient": ["shared_input_linear", "linear"],
    "bias": ["shared_input_linear", "linear"],
    "codes": ["shared_input_linear", "linear"],
    "hadamard": ["shared_input_linear", "shared_input_linear"],
    "factors": ["shared_input_linear", *["linear"] * 5],
}


SEVERAL_DICTS = ("codes", "hadamard", "factors")  # buffers, or parameters for each of two products


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_guards(kind, managers, compiled_on_a_gpu):
    """For each layer few, and none of an object for which all around it would be looked at piece by piece."""
    model = block(kind)
    run, graphs = compiling(model)
    x = tokens()
    torch.testing.assert_close(run(x), model(x))
    assert graphs == [KINDS[kind]]
    assert not compiled._waiting
    if not all(hasattr(managers[-1], name) for name in ("get_child_managers", "get_type_of_guarded_value")):
        pytest.skip("this torch does not tell what it guards")
    own = [node for node in nodes(managers[-1]) if "_proj" in node.get_source()]
    assert own
    assert not {node.get_source() for node in own if not issubclass(node.get_type_of_guarded_value(), SKIPPED)}
    assert len(own) / 4 <= 15
    # from torch 2.12 on it visits these, of which a float layer has three, and tensors, and passes over all else
    visited = [node for node in own if issubclass(node.get_type_of_guarded_value(), (nn.Module, dict))]
    assert len(visited) <= 3 * 4 + (7 if kind in SEVERAL_DICTS else 3)


def negated(model: Block) -> None:
    model.k_proj.weight_row_scale = nn.Parameter(-model.k_proj.weight_row_scale, requires_grad=False)


def replaced(model: Block) -> None:
    model.k_proj = packed("plain", 11)


def swapped(model: Block, other: Block) -> None:
    model.k_proj, other.k_proj = other.k_proj, model.k_proj


CHANGES = {
    "backend of one": lambda model: setattr(model.k_proj, "backend", "reference"),
    "backend of all": lambda model: [setattr(layer, "backend", "reference") for layer in model.children()],
    "dequantized": lambda model: [setattr(layer, "backend", "dequantize") for layer in model.children()],
    "loaded": lambda model: model.load_state_dict(block("plain", 7).state_dict()),
    "assigned": lambda model: model.load_state_dict(block("plain", 7).state_dict(), assign=True),
    "a scale": negated,
    "written": lambda model: model.v_proj.weight_row_scale.mul_(2),
    "a bias": lambda model: model.v_proj.register_parameter("bias", nn.Parameter(torch.ones(128), False)),
    "moved": lambda model: model.to("cpu", torch.bfloat16),
    "not shared": lambda model: model.q_proj.share(None),
    "shared anew": share_inputs,
    "replaced": replaced,
    "ended": lambda model: model.q_proj.shared_input.end(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_are_seen(change, compiled_on_a_gpu):
    model = block()
    run, _ = compiling(model)
    x = tokens()
    run(x)
    change(model)
    expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(run(x), expected, rtol=1e-2, atol=1e-1)
    assert not compiled._waiting
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(tokens())


@pytest.mark.parametrize("kind", ["hadamard", "codes", "factors"])
@torch.no_grad()
def test_loaded_weights_of_other_kinds_are_seen(kind, compiled_on_a_gpu):
    model, other = block(kind), block(kind, seed=7)
    if kind == "hadamard":  # signs of its own: what the layers do to their input is no longer alike
        other.k_proj.weight_input_signs.copy_(~other.k_proj.weight_input_signs)
    run, _ = compiling(model)
    x = tokens()
    run(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(x), model(x))


@torch.no_grad()
def test_layers_of_two_groups_that_change_places(compiled_on_a_gpu):
    models = block(), block(seed=7)
    both = nn.ModuleList(models)
    both.forward = lambda x: models[0](x) - models[1](x)
    run, _ = compiling(both)
    x = tokens()
    before = run(x)
    swapped(*models)
    expected = both.forward(x)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(run(x), expected)
    assert not compiled._waiting


@torch.no_grad()
def test_equal_blocks_are_one_graph(compiled_on_a_gpu):
    """Of blocks that are compiled one by one: nothing that compiled code reads is a group's own."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    for seed in (0, 7, 14):
        model = block(seed=seed)
        x = tokens()
        expected = model(x)
        model.compile(fullgraph=True, backend=backend)
        torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1


@torch.no_grad()
def test_a_layer_that_is_not_called(compiled_on_a_gpu):
    """Sharing ends, as outside of compiled code, and nothing stays."""
    model = block()
    model.forward = lambda x: model.o_proj(model.q_proj(x) + model.k_proj(x))
    run, graphs = compiling(model)
    for _ in range(3):
        x = tokens()
        torch.testing.assert_close(run(x), model(x))
    assert graphs[-1] == ["linear"] * 3
    assert not model.q_proj.shared_input.enabled
    assert not compiled._waiting


def test_gradients(compiled_on_a_gpu):
    """What is computed together has none: each layer by itself where one is wanted."""
    model = block("bias")
    run, graphs = compiling(model)
    x = tokens().requires_grad_()
    run(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    model.k_proj.bias.requires_grad_()
    run(x.detach()).sum().backward()
    assert model.k_proj.bias.grad is not None
    assert all("shared_input_linear" not in graph for graph in graphs)


@torch.no_grad()
def test_more_tokens_than_few(compiled_on_a_gpu):
    model = block()
    run, graphs = compiling(model)
    x = tokens(64)
    torch.testing.assert_close(run(x), model(x))
    assert graphs == [["linear"] * 4]


@torch.no_grad()
def test_copies_read_their_own_tensors(compiled_on_a_gpu):
    for kind in KINDS:
        torch.compiler.reset()
        model = block(kind)
        other = copy.deepcopy(model)
        other.q_proj.load_state_dict(packed(kind, 9).state_dict())
        x = tokens()
        for share in (False, True):
            if share:
                share_inputs(other)
            torch.testing.assert_close(compiling(other)[0](x), other(x))
            torch.testing.assert_close(compiling(model)[0](x), model(x))
