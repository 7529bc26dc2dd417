"""Prompts through layers of one input on a GPU, with launches that are made up: who computes for whom, and when not."""

import gc
import sys
import types
import weakref

import pytest
import torch
from accelerate import cpu_offload
from packed_weights import random_binarized
from shared_layers import layers, shared
from torch import nn

from optimum_arb.nn import ARBLinear, product, share_inputs, shared_input, shared_prompts
from optimum_arb.ops.backends import reference, triton
from optimum_arb.ops.hadamard import transform


@pytest.fixture
def runs(monkeypatch):
    """The runs of plans for all layers, by the shapes of their inputs; plans compute by the reference backend."""
    shapes: list[tuple[int, ...]] = []
    plans: list[tuple[int, ...]] = []

    def plan_group(x, weights, biases, change, backend):
        plans.append(tuple(x.shape))

        def run(x):
            shapes.append(tuple(x.shape))
            given = x if change is None else transform(x, *change, backend=backend)
            return [reference.linear(given, packed, bias) for packed, bias in zip(weights, biases, strict=True)]

        return types.SimpleNamespace(run=run)

    monkeypatch.setattr(shared_prompts, "plan_group", plan_group)
    monkeypatch.setattr(shared_prompts, "current_device", lambda: -1)  # what a tensor on the CPU says of its device
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return types.SimpleNamespace(shapes=shapes, plans=plans)


def expected(layer: ARBLinear, x: torch.Tensor) -> torch.Tensor:
    layer.backend = "reference"
    with torch.no_grad():
        return layer(x)


def ask(found: list[ARBLinear], x: torch.Tensor) -> list[torch.Tensor | None]:
    """As the layers do; None from one that has to compute by itself."""
    results = []
    with torch.no_grad():
        for layer in found:
            together = layer.shared_input
            results.append(together.output(layer, x, prompt=True) if together.joins_prompts else None)
    return results


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_as_each_alone(runs, bias):
    found = layers(bias=bias, permuted=True)
    together = shared(found)
    for shape in ((33, 300), (2, 20, 300), (33, 300)):
        x = torch.randn(shape)
        results = ask(found, x)
        for layer, result in zip(found, results, strict=True):
            assert torch.equal(result, reference.linear(x, layer.packed_weight(), layer.bias))
    assert runs.shapes == [(33, 300), (2, 20, 300), (33, 300)]
    assert runs.plans == [(33, 300), (2, 20, 300)]
    assert together.joins_prompts


class Attention(nn.Module):
    def __init__(self, found: list[ARBLinear]):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = found

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.v_proj(x), self.q_proj(x), self.k_proj(x)]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors say that they are on one."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(shared_input, "_current_stream", lambda device: 0)
    monkeypatch.setattr(product, "current_device", lambda: 0)  # another: no plans of a layer's own


@torch.no_grad()
def test_through_the_layers(runs, on_a_gpu):
    found = layers(bias=True)
    model = Attention(found)
    assert share_inputs(model) == 1
    for count in (20, 40, 20):
        x = torch.randn(1, count, 300, dtype=torch.float16)
        results = model(x)
        for layer, result in zip((found[2], found[0], found[1]), results, strict=True):
            assert torch.equal(result, reference.linear(x, layer.packed_weight(), layer.bias))
    assert len(runs.shapes) == 3
    model(torch.randn(2, 300, dtype=torch.float16))  # few tokens
    assert len(runs.shapes) == 3


@torch.no_grad()
def test_compiled_layers_compute_by_themselves(runs, on_a_gpu, monkeypatch):
    found = layers()
    shared(found)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.ops.optimum_arb, "linear", lambda x, *rest: x[..., :1])
    found[0]._looked = True
    found[0](torch.randn(20, 300))
    assert not runs.plans


@torch.no_grad()
def test_calls_of_all_layers_that_are_ready(runs, on_a_gpu, monkeypatch):
    """From the second prompt of a shape on; what is left to be taken is as without them."""
    entries = {}
    taken = []

    class Calls:
        def __init__(self, watched):
            taken.append(watched)

        def add(self, shape, results):
            entries[shape] = results

        def __call__(self, x):
            return entries.get(x.shape)

    made = types.ModuleType("calls")
    made.make_calls = Calls
    monkeypatch.setitem(sys.modules, f"{triton.__name__}.calls", made)
    monkeypatch.setattr(triton, "calls", made, raising=False)
    plan_group = shared_prompts.plan_group

    def with_native(*args):
        plan = plan_group(*args)
        plan.native, plan.entry = object(), lambda shape, bias: (shape, [torch.full((1,), float(i)) for i in range(3)])
        return plan

    monkeypatch.setattr(shared_prompts, "plan_group", with_native)
    found = layers()
    model = Attention(found)
    share_inputs(model)
    x = torch.randn(1, 20, 300, dtype=torch.float16)
    for _ in range(2):
        model(x)
    assert [float(result) for result in model(x)] == [2, 0, 1]
    together = found[0].shared_input
    assert not together._waiting
    assert len(runs.shapes) == 1
    watched = [(values, key) for values, key in taken[0]]
    assert all(any(values is layer._parameters for values, _ in watched) for layer in found)
    found[0](x)
    other = x + 1  # of one layer: each computes its own from then on
    assert found[1](other).shape == (1, 20, 7)
    assert not together.joins_prompts
    assert found[2](x).shape == (1, 20, 16)  # not what waited


def test_nothing_is_kept(runs):
    found = layers()
    together = shared(found)
    x = torch.randn(33, 300)
    kept = [weakref.ref(x)]
    results = ask(found, x)
    kept += [weakref.ref(result) for result in results]
    assert not together._waiting
    del x
    del results[0]  # each has memory of its own
    assert kept[1]() is None
    results.clear()
    gc.collect()
    assert [end() for end in kept] == [None] * 4


def test_gradients_are_not_lost(runs):
    found = layers(bias=True)
    shared(found)
    for layer in found:
        layer.bias.requires_grad_(False)
    together, x = found[0].shared_input, torch.randn(33, 300)
    assert together.output(found[0], x.clone().requires_grad_(), prompt=True) is None
    found[1].bias.requires_grad_()
    assert together.output(found[0], x, prompt=True) is None  # of another layer
    assert not runs.plans
    with torch.no_grad():
        assert together.output(found[0], x, prompt=True) is not None
    found[1].bias.requires_grad_(False)
    assert together.output(found[0], x.clone(), prompt=True) is not None


def test_what_is_not_joined(runs, monkeypatch):
    found = layers(columns=320)
    together = shared(found)
    x = torch.randn(33, 320)

    def refused(x: torch.Tensor) -> bool:
        return ask(found, x) == [None] * 3 and not together._waiting and not runs.plans

    assert refused(torch.randn(320, 33).T)  # not contiguous
    assert refused(torch.randn(33 * 320 + 1)[1:].view(33, 320))  # not aligned
    assert refused(torch.randn(33, 300))  # the operator says what is wrong with it
    assert refused(nn.Parameter(x, requires_grad=False))
    with monkeypatch.context() as other:
        other.setattr(shared_prompts, "current_device", lambda: 1)
        assert refused(x)
    with monkeypatch.context() as capturing:  # the host has to look at tensors
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert refused(x)
    found[2].backend = "dequantize"  # which does not come for its result
    assert refused(x)
    found[2].backend = "auto"
    cpu_offload(found[1], execution_device="cpu")
    assert refused(x)
    assert together.joins_prompts
    together.forget()
    assert refused(x)


def test_a_plan_that_cannot_be_made_is_asked_for_once(runs, monkeypatch):
    found = layers()
    together = shared(found)
    asked = []
    monkeypatch.setattr(shared_prompts, "plan_group", lambda *args: asked.append(1))
    for count in (33, 40, 33, 40):
        assert ask(found, torch.randn(count, 300)) == [None] * 3
    assert len(asked) == 2
    together.forget()
    ask(found, torch.randn(33, 300))
    assert len(asked) == 3


def test_many_sizes(runs):
    found = layers()
    together = shared(found)
    for count in range(17, 120):
        ask(found, torch.randn(count, 300))
        assert len(together._prompts._plans) <= shared_prompts.MAX_PLANS + 1
    assert len(runs.plans) == 103


def test_changed_tensors(runs):
    found = layers(bias=True)
    together = shared(found)
    x = torch.randn(33, 300)

    def check(plans: int) -> None:
        for layer, result in zip(found, ask(found, x), strict=True):
            assert torch.equal(result, reference.linear(x, layer.packed_weight(), layer.bias))
        assert len(runs.plans) == plans

    check(1)
    found[1].weight_row_scale = nn.Parameter(found[1].weight_row_scale * 2, requires_grad=False)
    check(2)
    found[2]._parameters["weight"] = nn.Parameter(found[2].weight.clone(), requires_grad=False)  # as accelerate does
    check(3)
    found[0].weight.data = found[0].weight.clone()
    check(4)
    found[1].bias = nn.Parameter(torch.randn(7), requires_grad=False)
    check(5)
    found[1].bias.data = torch.randn(7)
    check(6)
    found[2].load_state_dict(layers(rows=(16,), bias=True)[0].state_dict())
    check(7)
    with torch.no_grad():
        found[0].weight_row_scale.mul_(2)  # where it is
    check(7)
    ask(found[:1], x)
    assert together._waiting
    found[1].weight_row_scale = nn.Parameter(found[1].weight_row_scale * 2, requires_grad=False)
    assert not together._waiting


def test_input_that_was_written_between_two_layers(runs):
    found = layers()
    together = shared(found)
    x = torch.randn(33, 300)
    with torch.no_grad():
        assert together.output(found[0], x, prompt=True) is not None
        x.mul_(2)
        assert together.output(found[1], x, prompt=True) is None
        assert together.joins_prompts
    with torch.inference_mode():
        for result in ask(found, torch.randn(33, 300)):  # whose changes are not counted
            assert result is not None


def test_layers_on_several_streams(runs, on_a_gpu, monkeypatch):
    """A result that another stream computes may not be there yet."""
    found = layers()
    together = shared(found)
    x = torch.randn(33, 300)
    with torch.no_grad():
        assert together.output(found[0], x, prompt=True) is not None
        monkeypatch.setattr(shared_input, "_current_stream", lambda device: 7)
        assert together.output(found[1], x, prompt=True) is None
        monkeypatch.setattr(shared_input, "_current_stream", lambda device: 0)
        assert together.output(found[2], x, prompt=True) is not None


def test_another_input_of_some_layers(runs):
    found = layers()
    together = shared(found)
    with torch.no_grad():
        assert together.output(found[0], torch.randn(33, 300), prompt=True) is not None
        assert together.output(found[1], torch.randn(33, 300), prompt=True) is None
    assert not together.joins_prompts
    assert not together.enabled


def test_a_layer_that_is_never_called(runs):
    """Its result would be computed, and held, at every call."""
    found = layers()
    together = shared(found)
    asked = 0
    while together.joins_prompts and asked < 10:
        ask(found[:2], torch.randn(33, 300))
        asked += 1
    assert asked == shared_input.MOST_WASTED + 1
    assert not together._waiting


def test_errors_now_and_then_are_forgiven(runs):
    found = layers()
    together = shared(found)
    for _ in range(10):
        ask(found[:2], torch.randn(33, 300))
        assert None not in ask(found, torch.randn(33, 300))
    assert together.joins_prompts


def hadamard_layers(signs: tuple[int, int]) -> list[ARBLinear]:
    """Layers whose Hadamard transforms have the signs of these seeds."""
    found = []
    for rows, seed in zip((42, 7), signs, strict=True):
        generator = torch.Generator().manual_seed(seed)
        weight = random_binarized(layers()[0].layout, rows, 256)
        weight.hadamard = 64
        weight.input_signs = torch.rand(256, generator=generator) < 0.5
        found.append(ARBLinear.from_binarized(weight))
    return found


def test_one_transform_of_the_input(runs):
    found = hadamard_layers((1, 1))
    together = shared(found)
    x = torch.randn(33, 256)
    for layer, result in zip(found, ask(found, x), strict=True):
        assert torch.equal(result, expected(layer, x))
    assert len(runs.shapes) == 1
    assert together.joins_prompts


def test_transforms_that_differ(runs):
    found = hadamard_layers((1, 2))
    together = shared(found)
    together.forget()  # as when weights are loaded: they are compared again
    assert ask(found, torch.randn(33, 256)) == [None] * 2
    assert not together.joins_prompts
    assert not runs.plans
