"""Launches that a layer keeps ready for inputs of a size, on a CPU, with launches that are made up."""

import copy
import types

import pytest
import torch
from packed_weights import random_binarized
from torch import nn

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear, product


@pytest.fixture
def made(monkeypatch):
    """The inputs' shapes that plans were made for; a plan gives its number."""
    shapes: list[tuple[int, ...]] = []

    def plan(x, tensors, bias, layout, block_size, backend):
        shapes.append(tuple(x.shape))
        number = float(len(shapes))
        return types.SimpleNamespace(run=lambda x, bias: number)

    monkeypatch.setattr(product, "plan", plan)
    monkeypatch.setattr(product, "_current_device", lambda: -1)  # what a tensor of the CPU says of itself
    return shapes


def layer(bias: bool = False) -> ARBLinear:
    weight = random_binarized(planes_layout(2, col_scale=True), 42, 256)
    return ARBLinear.from_binarized(weight, torch.randn(42) if bias else None)


def ask(found: ARBLinear, x: torch.Tensor):
    return found._planned(x, found._operands(), found.bias)


def test_one_plan_a_size(made):
    found = layer()
    x = torch.randn(2, 32, 256).half()
    assert [ask(found, x) for _ in range(3)] == [1.0] * 3
    assert ask(found, x.view(64, 256)) == 1.0
    assert ask(found, x[:1]) == 2.0
    assert ask(found, x.bfloat16()) == 3.0
    assert ask(found, x) == 1.0
    assert len(made) == 3


def test_many_sizes(made):
    found = layer()
    for count in range(1, 200):
        ask(found, torch.randn(count, 256).half())
        assert found._plans is not None
        assert len(found._plans) <= product.MAX_PLANS + 1
    assert len(made) == 199


def test_changed_tensors(made):
    found = layer(bias=True)
    x = torch.randn(64, 256).half()
    assert ask(found, x) == 1.0
    found.weight_row_scale = nn.Parameter(found.weight_row_scale * 2, requires_grad=False)
    assert ask(found, x) == 2.0
    found._parameters["weight"] = nn.Parameter(found.weight.clone(), requires_grad=False)  # as accelerate does
    assert ask(found, x) == 3.0
    found.weight.data = found.weight.clone()
    assert ask(found, x) == 4.0
    found.load_state_dict(layer(bias=True).state_dict())
    assert ask(found, x) == 5.0
    found.bias = nn.Parameter(torch.randn(42).half(), requires_grad=False)
    assert ask(found, x) == 6.0
    assert ask(found, x) == 6.0
    copied = copy.deepcopy(found)
    assert copied._plans is None
    assert ask(copied, x) == 7.0


def test_what_the_host_has_to_look_at(made, monkeypatch):
    found = layer()
    x = torch.randn(64, 256).half()
    assert ask(found, x.T.contiguous().T) is None  # not contiguous
    assert ask(found, torch.randn(64 * 256 + 1).half()[1:].view(64, 256)) is None  # not aligned
    assert ask(found, torch.randn(64, 128).half()) is None  # of another size: the operator says so
    found.backend = "triton:batch-invariant"
    assert ask(found, x) is None
    found.backend = "triton"
    monkeypatch.setattr(product, "_current_device", lambda: 1)
    assert ask(found, x) is None
    assert not made
    monkeypatch.setattr(product, "_current_device", lambda: -1)
    monkeypatch.setattr(product, "plan", lambda *args: made.append(()))
    assert ask(found, x) is None  # no plan can be made, which is asked once
    assert ask(found, x) is None
    assert len(made) == 1


def test_backends_without_plans():
    found = layer()
    tensors = found._operands()
    for backend in ("auto", "cpu", "reference", "auto:batch-invariant"):
        assert product.plan(torch.randn(64, 256), tensors, None, found.layout, 128, backend) is None
