"""What a layer keeps ready for inputs of a size: a GPU's launches, made up here, and calls of the CPU's kernels."""

import copy
import pickle
import types

import pytest
import torch
from packed_weights import random_binarized, random_factorized
from torch import nn

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBFactorizedLinear, ARBLinear, product
from optimum_arb.ops.backends.cpu import native
from optimum_arb.ops.linear import linear_without_grad


@pytest.fixture
def made(monkeypatch):
    """The inputs' shapes that plans were made for; a plan gives its number."""
    shapes: list[tuple[int, ...]] = []

    def plan(x, tensors, bias, layout, block_size, backend):
        shapes.append(tuple(x.shape))
        number = float(len(shapes))
        return types.SimpleNamespace(run=lambda x, bias: number)

    monkeypatch.setattr(product, "plan", plan)
    return shapes


def layer(bias: bool = False) -> ARBLinear:
    weight = random_binarized(planes_layout(2, col_scale=True), 42, 256)
    return ARBLinear.from_binarized(weight, torch.randn(42) if bias else None)


def ask(found: ARBLinear, x: torch.Tensor):
    return found._planned(x, found.bias)


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
    assert ask(found, torch.randn(64, 128).half()) is None  # of another size: the operator says so
    found.backend = "triton:batch-invariant"
    assert ask(found, x) is None
    found.backend = "triton"
    assert not made
    monkeypatch.setattr(product, "plan", lambda *args: made.append(()))
    assert ask(found, x) is None  # no plan can be made, which is asked once
    assert ask(found, x) is None
    assert len(made) == 1


def test_backends_without_plans():
    found = layer()
    tensors = found._operands()
    for backend in ("reference", "auto:batch-invariant"):
        assert product.plan(torch.randn(1, 256), tensors, None, found.layout, 128, backend) is None


# Plans of the CPU's kernels

needs_native = pytest.mark.skipif(native.load() is None, reason="the native extension was not built")


def without_plans(found: ARBLinear, x: torch.Tensor) -> torch.Tensor:
    return linear_without_grad(x, found._operands(), found.bias, found.layout, found.block_size, found.backend)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("bias", [False, True])
def test_planned_on_a_cpu(dtype, backend, bias):
    found = layer(bias)
    found.backend = backend
    for shape in ((256,), (1, 256), (2, 1, 256), (3, 256)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(found(x), without_plans(found, x))
    assert found._plans is not None
    assert [plan is not None for plan in found._plans.values()] == [True] * 3


@needs_native
def test_planned_input_anywhere_in_memory():
    found = layer()
    all_of_it = torch.randn(1 + 256)
    with torch.no_grad():
        assert torch.equal(found(all_of_it[1:]), found(all_of_it[1:].clone()))


@needs_native
def test_planned_weights_that_change():
    """In place, which the plan sees through its addresses, and by others in their place."""
    found, x = layer(), torch.randn(1, 256)
    with torch.no_grad():
        first = found(x)
        found.weight_row_scale.mul_(2)
        assert torch.equal(found(x), 2 * first)
        found.weight_row_scale.data = found.weight_row_scale / 2
        assert torch.equal(found(x), first)
        other = layer()
        other.weight_row_scale.mul_(4)
        found.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(found(x), 4 * first)


@needs_native
def test_no_plan_where_the_weight_is_dequantized():
    found = layer()
    with torch.no_grad():
        found(torch.randn(600, 256).bfloat16())
        found(torch.randn(0, 256))
        assert found(torch.randn(1, 256, dtype=torch.float64)).dtype == torch.float64
    assert list(found._plans.values()) == [None] * 3


@needs_native
def test_layers_with_plans_are_copied_and_pickled():
    factors = ARBFactorizedLinear.from_factorized(random_factorized(42, 256, 40), None)
    for found in (layer(), factors):
        x = torch.randn(1, 256)
        with torch.no_grad():
            expected = found(x)
            assert torch.equal(copy.deepcopy(found)(x), expected)
            assert torch.equal(pickle.loads(pickle.dumps(found))(x), expected)
