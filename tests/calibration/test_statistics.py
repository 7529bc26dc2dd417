from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_arb.calibration import InputStatistics
from optimum_arb.calibration import statistics as statistics_module
from optimum_arb.calibration.statistics import Statistic, add_product, product_ahead


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)
        self.o = nn.Linear(4, 6)
        self.conv = Conv1D(3, 6)
        self.idle = nn.Linear(6, 2)

    def forward(self, x, other=None):
        q, k = self.q(x), self.k(x if other is None else other)
        return self.conv(self.o(q * k))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer().eval()


def gather(layer, batches):
    linears = dict(layer.named_children())
    with torch.no_grad(), InputStatistics(linears) as statistics:
        for batch in batches:
            layer(batch)
            statistics.end_batch()
    return statistics


def test_sum_over_all_batches(layer):
    batches = [torch.randn(2, 5, 6), torch.randn(3, 5, 6)]
    statistics = gather(layer, batches)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    torch.testing.assert_close(statistics.hessian("q"), rows.T @ rows)
    assert statistics.tokens("q") == 25
    with torch.no_grad():
        inner = layer.q(rows) * layer.k(rows)
        torch.testing.assert_close(statistics.hessian("o"), inner.T @ inner)
        outer = layer.o(inner)
        torch.testing.assert_close(statistics.hessian("conv"), outer.T @ outer)


def test_the_same_input_is_summed_once_and_shared(layer):
    statistics = gather(layer, [torch.randn(2, 5, 6)])
    assert statistics.hessian("q") is statistics.hessian("k")
    assert statistics.tokens("k") == 10
    assert statistics.hessian("q") is not statistics.hessian("o")


def test_equal_but_different_tensors_are_not_shared(layer):
    x = torch.randn(2, 5, 6)
    with torch.no_grad(), InputStatistics(dict(layer.named_children())) as statistics:
        layer(x, x.clone())
    assert statistics.hessian("q") is not statistics.hessian("k")
    torch.testing.assert_close(statistics.hessian("q"), statistics.hessian("k"))


def test_an_input_that_is_shared_at_times_only_is_an_error(layer):
    x = torch.randn(2, 5, 6)
    with torch.no_grad(), InputStatistics(dict(layer.named_children())) as statistics:
        layer(x)
        statistics.end_batch()
        with pytest.raises(RuntimeError, match="k shared its input"):
            layer(x, x.clone())


def test_a_linear_that_nothing_reaches(layer):
    statistics = gather(layer, [torch.randn(2, 5, 6)])
    assert statistics.hessian("idle") is None
    assert statistics.tokens("idle") == 0


def test_hooks_are_removed(layer):
    gather(layer, [torch.randn(1, 2, 6)])
    assert not any(module._forward_pre_hooks for module in layer.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(layer, dtype):
    layer.to(dtype)
    x = torch.randn(4, 500, 6).to(dtype)
    statistics = gather(layer, [x])
    rows = x.flatten(0, 1).double()
    found = statistics.hessian("q")
    assert found.dtype == torch.float32
    # of what is summed, whose signs cancel, one after another: 2^-18 was seen, and in half precision it would be 2^-9
    error = (found.double() - rows.T @ rows).abs() / (rows.abs().T @ rows.abs())
    assert float(error.max()) < 2**-15


def test_autocast_does_not_reach_the_sum(layer):
    x = torch.randn(4, 50, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = gather(layer, [x])
    rows = x.flatten(0, 1)
    torch.testing.assert_close(statistics.hessian("q"), rows.T @ rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("features", [1, 3, 4, 37, 130])
def test_the_half_that_is_not_computed_is_that_which_is(features):
    batches = torch.randn(3, 50, features, generator=torch.Generator().manual_seed(features))
    statistic = Statistic(features, torch.device("cpu"))
    for batch in batches:
        statistic.add(batch)
    rows, quarter = batches.flatten(0, 1).double(), -(-features // 4)
    torch.testing.assert_close(statistic.hessian, (rows.T @ rows).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(statistic.hessian[:quarter, quarter:], statistic.hessian[quarter:, :quarter].T)


@pytest.mark.parametrize("limit", [statistics_module.MADE_WHOLE, 0])
def test_products_that_are_made_ahead_sum_to_the_same(layer, limit, monkeypatch):
    monkeypatch.setattr(statistics_module, "MADE_WHOLE", limit)
    batches = [torch.randn(2, 5, 6) for _ in range(3)]
    expected = gather(layer, batches)
    with torch.no_grad(), InputStatistics(dict(layer.named_children())) as statistics:
        for batch in batches:
            with statistics.taking() as taken:
                layer(batch)
            statistics.multiply(taken)
            assert all((found.product is not None) == (limit > 0) for found in taken)
            # one input, one product
            assert taken[0].product is taken[1].product
            statistics.add(taken)
    for name in ("q", "k", "o", "conv"):
        assert torch.equal(statistics.hessian(name), expected.hessian(name))
        assert statistics.tokens(name) == expected.tokens(name)


@pytest.mark.parametrize("rows", [3, 7])
def test_a_product_made_ahead_is_what_is_added(rows):
    left, right = torch.randn(11, rows), torch.randn(11, 7)
    for one, other in ((left, right), (right, right)):
        total, ahead = (torch.zeros(one.shape[1], 7, dtype=torch.float64) for _ in range(2))
        add_product(total, one, other)
        add_product(ahead, one, other, product_ahead(one, other))
        assert torch.equal(total, ahead)
