"""Calls that somebody looks at: the layer is an operator of the graph, and no kernel reads what has no memory."""

import pytest
import torch
from packed_weights import random_binarized, random_factorized, relative_error
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import packed_linear


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["one", "factors", "8 bits"])
def layer(request):
    if request.param == "factors":
        return packed_linear(random_factorized(42, 300, 40))
    weight = random_binarized(planes_layout(2, col_scale=True), 42, 300)
    return packed_linear(weight, scale_bits=8 if request.param == "8 bits" else 16)


@torch.no_grad()
def test_a_dispatch_mode_sees_the_operator(layer):
    x = torch.randn(3, 300)
    expected = layer(x)
    with Seen() as seen:
        found = layer(x)
    assert "optimum_arb.linear.default" in seen.names
    assert relative_error(found, expected) < 3e-6


@torch.no_grad()
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_layer_computes_other_inputs(layer, mode):
    """What a kernel had computed was a constant of the graph."""
    x, other = torch.randn(2, 3, 300)
    layer(x)  # plans are ready
    graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert relative_error(graph(other), layer(other)) < 3e-6


@torch.no_grad()
def test_fake_results_have_no_memory_to_write(layer):
    x = torch.randn(3, 300)
    layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for given in (x, mode.from_tensor(x)):
            found = layer(given)
            assert found.shape == (3, 42)
