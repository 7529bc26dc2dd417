"""What a layer keeps ready for inputs of a size: a GPU's launches, made up here, and calls of the CPU's kernels."""

import copy
import gc
import pickle
import sys
import types
import weakref

import pytest
import torch
from packed_weights import random_binarized, random_factorized
from torch import nn

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBFactorizedLinear, ARBLinear, product
from optimum_arb.ops.backends import triton
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


# Calls that were made ready


class Calls:
    """As `_calls.Calls`: gives what was announced, for inputs of the shapes that were."""

    def __init__(self, watched):
        self.watched, self.entries, self.taken = watched, {}, 0

    def add(self, shape, value) -> None:
        self.entries[shape] = value

    def __call__(self, x):
        found = self.entries.get(x.shape)
        self.taken += found is not None
        return found


@pytest.fixture
def ready(monkeypatch):
    """All that were made; plans launch natively, and tensors say that they are on a GPU."""
    calls: list[Calls] = []
    fake = types.ModuleType("calls")
    fake.make_calls = lambda watched: calls.append(Calls(watched)) or calls[-1]
    monkeypatch.setitem(sys.modules, f"{triton.__name__}.calls", fake)
    monkeypatch.setattr(triton, "calls", fake, raising=False)

    def plan(x, *rest):
        native = object()
        entry = lambda shape, bias: (shape, torch.zeros(1))  # noqa: E731
        return types.SimpleNamespace(run=lambda x, bias: torch.ones(1), native=native, entry=entry)

    monkeypatch.setattr(product, "plan", plan)
    monkeypatch.setattr(product, "current_device", lambda: -1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def is_ready(found: ARBLinear, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return not found(x).any()


def test_calls_that_are_ready(ready):
    found = layer(bias=True)
    x = torch.randn(2, 32, 256).half()
    assert [is_ready(found, x) for _ in range(3)] == [False, True, True]
    assert not is_ready(found, x.view(64, 256))  # of another shape
    assert is_ready(found, x.view(64, 256))
    assert len(ready) == 1
    assert {key for _, key in ready[0].watched} >= {"weight", "weight_row_scale", "weight_col_scale", "bias"}
    assert all(values is found._parameters or values is found._buffers for values, _ in ready[0].watched)


def test_calls_that_are_not_taken(ready, monkeypatch):
    found = layer(bias=True)
    x = torch.randn(64, 256).half()
    is_ready(found, x)
    assert is_ready(found, x)
    before = ready[0].taken
    assert found(x).any()  # where gradients are wanted: the bias has one
    found.backend = "triton"
    assert not is_ready(found, x)
    found.backend = "auto"
    assert not is_ready(found, x)
    with monkeypatch.context() as compiling, torch.no_grad():
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        compiling.setattr(torch.ops.optimum_arb, "linear", lambda x, *rest: torch.ones(1))
        found._looked = True
        assert found(x).any()
    assert ready[0].taken == before


def test_calls_end_with_what_they_were_made_of(ready):
    found = layer()
    x = torch.randn(64, 256).half()
    for change in (
        lambda: setattr(found, "weight_row_scale", nn.Parameter(found.weight_row_scale * 2, requires_grad=False)),
        lambda: found.load_state_dict(layer().state_dict()),
        lambda: found.to(torch.bfloat16),
        found.prepare,
    ):
        is_ready(found, x)
        assert is_ready(found, x)
        change()
        assert not is_ready(found, x)


def test_no_plan_is_kept_of_a_capture(ready, monkeypatch):
    """It may be of another kernel than later, when they have been checked; those that there are serve a capture."""
    found = layer()
    x = torch.randn(64, 256).half()
    for capturing, planned in ((True, False), (False, True), (True, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert (found._planned(x, None) is not None) == planned
        assert bool(found._plans) == planned


def test_new_launches_are_made_ready(ready):
    """As after column scales were written, which a copy was made of."""
    found = layer()
    x = torch.randn(64, 256).half()
    is_ready(found, x)
    (made,) = found._plans.values()
    made.native = object()
    ready[0].entries.clear()  # as the calls notice it
    assert not is_ready(found, x)
    assert is_ready(found, x)
    assert len(ready) == 1


def test_layers_with_ready_calls_end_at_once(ready):
    found = layer()
    x = torch.randn(64, 256).half()
    is_ready(found, x)
    end = weakref.ref(found)
    gc.disable()
    try:
        del found
        assert end() is None
    finally:
        gc.enable()


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


@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_bias_of_any_strides(kind):
    found = layer()
    bias = torch.randn(42, 2)[:, 0] if kind == "strided" else torch.randn(1).expand(42)
    found.bias = nn.Parameter(bias, requires_grad=False)
    x = torch.randn(1, 256)
    with torch.no_grad():
        torch.testing.assert_close(found(x), x @ found.dequantize().T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(native.load() is None, reason="the native extension was not built")
def test_weights_that_the_kernels_cannot_read():
    with torch.no_grad():
        for rows in (1, 200):
            found = layer(bias=True)
            x = torch.randn(rows, 256)
            found.bias = nn.Parameter(torch.randn(5), requires_grad=False)
            with pytest.raises((ValueError, RuntimeError), match=r"elements|size"):
                found(x)
            found = layer()
            found.weight_row_scale = nn.Parameter(found.weight_row_scale[:5].clone(), requires_grad=False)
            with pytest.raises((ValueError, RuntimeError), match=r"elements|size"):
                found(x)
            with pytest.raises((ValueError, RuntimeError), match=r"on meta|on device meta"):
                layer().to("meta")(x)
