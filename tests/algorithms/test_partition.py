import numpy as np
import pytest
import torch

from optimum_arb.algorithms.partition import large_weights, salient_columns
from optimum_arb.algorithms.residual import residual_binarization


def squared_error(weight, groups, order):
    return float((weight - residual_binarization(weight, groups, order).reconstruction()).double().square().sum())


def test_salient_search_equals_trying_every_count(weight):
    block = weight[:, :64].abs()
    order = block.sum(0).argsort(descending=True)
    errors = []
    for count in range(1, 50):
        first = torch.zeros(64)
        first[order[:count]] = 1
        errors.append(squared_error(block, torch.stack([first, 1 - first])[:, None].expand(2, 48, 64), 2))
    chosen = salient_columns(block.abs(), "search")
    assert chosen.tolist() == sorted(order[: 1 + int(np.argmin(errors))].tolist())


def test_fixed_number_of_salient_columns(weight):
    block = weight[:, :64]
    assert salient_columns(block.square(), 5).tolist() == sorted(block.square().sum(0).topk(5).indices.tolist())


def test_salient_columns_never_take_the_whole_block():
    block = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    assert len(salient_columns(block.square(), 20)) == 2
    assert len(salient_columns(block.square(), "search")) in (1, 2)
    assert len(salient_columns(block[:, :1].square(), "search")) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_split_equals_trying_every_quantile(weight, order):
    errors = []
    thresholds = np.quantile(weight.abs().double().numpy(), np.linspace(0.1, 0.9, 81))
    for threshold in thresholds:
        large = (weight.abs().double() >= threshold).float()
        errors.append(squared_error(weight, torch.stack([large, 1 - large]), order))
    large = large_weights(weight, weight.abs(), order)
    error = squared_error(weight, torch.stack([large.float(), 1 - large.float()]), order)
    assert error == pytest.approx(min(errors), rel=1e-6)


def test_split_of_scores_counts_zeroed_columns(weight):
    # as published: entries of salient columns enter the quantiles as zeros, so the thresholds move
    magnitude = weight.abs().clone()
    magnitude[:, :200] = 0
    thresholds = np.quantile(magnitude.double().numpy(), np.linspace(0.1, 0.9, 81))
    large = large_weights(weight[:, 200:], magnitude, 1)
    assert any(torch.equal(large, weight[:, 200:].abs().double() >= t) for t in thresholds)


def test_equal_weights_and_empty_zones():
    assert large_weights(torch.ones(3, 8), torch.ones(3, 8), 2).all()
    assert large_weights(torch.zeros(3, 0), torch.zeros(0), 1).shape == (3, 0)
