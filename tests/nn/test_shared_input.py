"""Layers of one input that compute together: the object that holds their results, on a CPU, where it is not used."""

import gc
import threading
import weakref

import pytest
import torch
from fresh_process import python
from shared_layers import layers, shared
from torch import nn


@pytest.mark.parametrize("shape", [(300,), (1, 300), (2, 1, 300), (3, 300), (0, 300)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["planes-1", "planes-2-col", "groups-all-salient-col"])
def test_the_same_as_each_alone(name, bias, shape):
    found = layers(name, bias=bias, permuted=True)
    together = shared(found)
    x = torch.randn(shape)
    for count in (3, 2, 3):
        for layer in found if count == 3 else reversed(found):  # in any order
            result = together.output(layer, x)
            assert result is not None
            assert result.is_contiguous()
            assert torch.equal(result, layer(x))
    assert together.enabled


def test_computed_once():
    found = layers()
    together = shared(found)
    times = []
    compute = together._compute
    together._compute = lambda *args: times.append(1) or compute(*args)
    for _ in range(2):
        x = torch.randn(1, 300)
        for layer in found:
            together.output(layer, x)
    assert len(times) == 2


def test_nothing_is_kept_when_all_have_theirs():
    found = layers()
    together = shared(found)
    x = torch.randn(1, 300)
    kept = weakref.ref(x)
    results = [together.output(layer, x) for layer in found]
    assert not together._waiting
    kept_result = weakref.ref(results[0])
    del x, results
    gc.collect()
    assert kept() is None
    assert kept_result() is None


def test_a_second_question_is_answered_by_the_layer():
    found = layers()
    together = shared(found)
    x = torch.randn(1, 300)
    assert together.output(found[0], x) is not None
    assert together.output(found[0], x) is None
    assert together.output(found[1], x) is not None
    assert together.output(found[2], x) is not None
    assert together.enabled


def test_cross_attention_disables():
    """Key and value of another input than the query: each computes its own, from then on, and by a copy of its own."""
    found = layers()
    together = shared(found)
    for layer in found:
        layer._looked = True
    x, memory = torch.randn(1, 300), torch.randn(1, 300)
    assert torch.equal(together.output(found[0], x), found[0](x))
    assert together.output(found[1], memory) is None
    assert not together.enabled
    assert not together._waiting
    assert not any(layer._looked for layer in found)


def test_a_call_that_an_error_ended_is_forgotten():
    found = layers()
    together = shared(found)
    together.output(found[0], torch.randn(1, 300))
    x = torch.randn(1, 300)
    for layer in found:
        assert torch.equal(together.output(layer, x), layer(x))
    assert together.enabled
    assert not together._waiting


def test_layers_and_the_object_end_together():
    """Without the collector of cycles."""
    found = layers()
    together = shared(found)
    together.output(found[0], torch.randn(1, 300))
    ends = [weakref.ref(together), *(weakref.ref(layer) for layer in found)]
    gc.disable()
    try:
        del together, found
        assert [end() for end in ends] == [None] * 4
    finally:
        gc.enable()


def test_a_layer_that_was_replaced():
    found = layers()
    together = shared(found)
    del found[1]
    assert together.output(found[0], torch.randn(1, 300)) is None
    assert not together.enabled
    assert len(together.layers) == 2


def test_threads_do_not_meet():
    """Each between two layers when the other comes: results are of the thread's own input, and sharing goes on."""
    found = layers(bias=True)
    together = shared(found)
    barrier = threading.Barrier(4)
    failures = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(1, 300, generator=generator)
            for layer in found:
                barrier.wait(10)
                result = together.output(layer, x)
                if result is None or not torch.equal(result, layer(x)):
                    failures.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert together.enabled
    assert not together._waiting


def test_equal_values_are_not_the_same_input():
    found = layers()
    together = shared(found)
    x = torch.randn(1, 300)
    together.output(found[0], x)
    assert together.output(found[1], x.clone()) is None


def test_changed_tensors_are_forgotten():
    """What was computed before one of the layers got another weight is not handed out after."""
    found = layers()
    together = shared(found)
    together._prepared = object()
    x = torch.randn(1, 300)
    found[1].weight_row_scale = nn.Parameter(found[1].weight_row_scale * 2, requires_grad=False)
    assert together._prepared is None
    together.output(found[0], x)
    found[1].load_state_dict(layers(rows=(7,))[0].state_dict())
    assert not together._waiting
    assert torch.equal(together.output(found[1], x), found[1](x))
    found[2].to(torch.bfloat16)
    assert not together._waiting


def test_the_end_of_a_process_says_nothing():
    """Layers that end once Python has taken torch's modules apart, as those of a model that something keeps."""
    code = """
import torch
from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear
from optimum_arb.nn.shared_input import SharedInput
layers = [ARBLinear(256, 8, planes_layout(1), 128, bias=False, permuted=False) for _ in range(2)]
shared = SharedInput(layers)
for index, layer in enumerate(layers):
    layer.share(shared, index)
torch.nn.held = layers
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
