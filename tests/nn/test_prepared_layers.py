"""What is prepared on a GPU for layers of one input, with a kernel that is made up."""

import sys
import types

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from shared_layers import layers, shared
from torch import nn

from optimum_arb.nn import prepared_layers as module
from optimum_arb.nn import shared_input
from optimum_arb.nn.prepared_layers import prepare_layer
from optimum_arb.ops.backends import triton


@pytest.fixture
def prepare(monkeypatch):
    """The weights that copies were asked for, by their rows."""
    asked: list[list[int]] = []
    made = types.SimpleNamespace(rows=0, most_tokens=8)
    fake = types.ModuleType("few_tokens")
    fake.prepare = lambda weights: asked.append([packed.out_features for packed in weights]) or made
    monkeypatch.setitem(sys.modules, f"{triton.__name__}.few_tokens", fake)
    monkeypatch.setattr(triton, "few_tokens", fake, raising=False)
    monkeypatch.setattr(module, "has_one_bit_kernel", lambda device: device.type == "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def test_one_copy_for_all(prepare):
    found = layers()
    together = shared(found)
    assert prepare_layer(found[0]) is None  # it has none of its own
    assert together._prepared is not None
    assert prepare == [[42, 7, 16]]
    x = torch.randn(8, 300).half()
    with torch.no_grad():
        assert found[1]._few_tokens(x)
        assert not found[1]._few_tokens(torch.cat([x, x]))
    del prepare[1:]
    together.enabled = False
    assert prepare_layer(found[0]) is not None
    assert prepare[1:] == [[42]]


def test_offloaded_layers_have_copies_of_their_own(prepare):
    """Only the layer that is about to run is on the GPU; the others are on the meta device."""
    found = layers()
    together = shared(found)
    found[1].to("meta")
    assert prepare_layer(found[0]) is not None
    assert not together.enabled
    assert prepare == [[42]]
    assert prepare_layer(found[1]) is None


def test_nothing_of_an_offloaded_layer_stays_on_the_gpu(prepare):
    found = layers()
    together = shared(found)
    for layer in found:
        cpu_offload(layer, execution_device="cpu")
    assert prepare_layer(found[0]) is None
    assert not prepare
    remove_hook_from_module(found[0])
    add_hook_to_module(found[0], SequentialHook(ModelHook(), AlignDevicesHook("cpu", offload=True)))
    assert prepare_layer(found[0]) is None
    remove_hook_from_module(found[0])
    assert prepare_layer(found[0]) is not None  # the others are still offloaded
    assert not together.enabled
    assert prepare == [[42]]


def test_few_tokens_of_a_layer(prepare):
    found = layers(rows=(42,), bias=True)[0].requires_grad_(False)
    x = torch.randn(1, 300)
    cases = [
        (x.half(), True),
        (x.bfloat16(), True),
        (x, False),
        (torch.randn(2, 2, 300).half(), True),
        (torch.randn(8, 300).half(), True),  # as the copy says
        (torch.randn(9, 300).half(), False),
        (torch.randn(0, 300).half(), False),
        (torch.randn(2, 1, 150).half(), False),  # the operator says what is wrong with it
        (x.half().requires_grad_(), False),
    ]
    for given, few in cases:
        assert found._few_tokens(given) == few, given.shape
    with torch.no_grad():
        assert found._few_tokens(x.half().requires_grad_())
    found.bias.requires_grad_()
    assert not found._few_tokens(x.half())  # its gradient would be lost
    with torch.no_grad():
        assert found._few_tokens(x.half())
    found.backend = "triton:batch-invariant"
    with torch.no_grad():
        assert not found._few_tokens(x.half())


def test_prepared_before_the_first_call(prepare):
    """As for code that compiles the first call."""
    found = layers(rows=(42,))[0]
    found.prepare()
    assert prepare == [[42]]
    with torch.no_grad():
        assert found._few_tokens(torch.randn(8, 300).half())
    assert prepare == [[42]]


CHANGES = {
    "written": lambda layer: layer.weight_row_scale.mul_(2),
    "signs": lambda layer: layer.weight.bitwise_not_(),
    "data": lambda layer: setattr(layer.weight, "data", ~layer.weight.data),
    "replaced": lambda layer: layer._parameters.update(weight=nn.Parameter(~layer.weight, requires_grad=False)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_copied_anew(prepare, change):
    """Few tokens went on with the signs and scales of before, prompts had the new ones."""
    found = layers(rows=(42,), bias=True)[0]
    x = torch.randn(1, 300).half()
    for _ in range(2):
        assert found._few_tokens(x)
    found.bias.mul_(2)  # no part of the copy
    assert found._few_tokens(x)
    assert prepare == [[42]]
    CHANGES[change](found)
    for _ in range(2):
        assert found._few_tokens(x)
    assert prepare == [[42]] * 2


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_of_a_group_are_copied_anew(prepare, change, monkeypatch):
    """Of a layer that is not the first too, whose results the first computes."""
    found = layers()
    together = shared(found)
    ran = []

    def run(x, prepared, bias, rows, **rest):
        ran.append(prepared)
        return torch.zeros(len(x) * sum(rows))

    monkeypatch.setattr(shared_input, "runner", lambda: run)
    found[0].prepare()
    for step in range(3):
        x = torch.randn(1, 300)
        if step == 1:
            CHANGES[change](found[2])
        for layer in found:
            assert together.output(layer, x) is not None
        assert prepare == [[42, 7, 16]] * (1 + (step >= 1))
    assert len(ran) == 3


@torch.no_grad()
def test_inference_tensors_are_copied_once(prepare):
    """Nothing tells that they were written."""
    with torch.inference_mode():
        found = layers(rows=(42,))[0]
    for _ in range(2):
        assert found._few_tokens(torch.randn(1, 300).half())
    assert prepare == [[42]]
