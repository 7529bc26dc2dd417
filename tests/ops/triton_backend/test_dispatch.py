"""Which kernel computes, in Triton's interpreter: what does not need a GPU of it."""

import pytest
import torch
from packed_weights import random_packed, relative_error

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import dispatch
from optimum_arb.ops.backends.triton.dispatch import input_grad, linear
from optimum_arb.ops.backends.triton.table import Entry


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_batch_invariant(dtype):
    """By the fused kernel, and by products of a fixed number of rows where that does not compute."""
    packed = random_packed(planes_layout(2, col_scale=True), 42, 300, permuted=True)
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(42).to(dtype)
    whole = linear(x, packed, bias, batch_invariant=True)
    expected = torch.nn.functional.linear(x.double(), packed.unpack().dequantize(torch.float64), bias.double())
    assert whole.dtype == dtype
    assert relative_error(whole, expected) < (2e-3 if dtype == torch.float16 else 1e-5)
    for m in (1, 3, 64):
        assert torch.equal(linear(x[:m], packed, bias, batch_invariant=True), whole[:m])
    assert torch.equal(linear(x.T.contiguous().T[:7], packed, bias, batch_invariant=True), whole[:7])


def test_float64_and_no_tokens():
    packed = random_packed(planes_layout(1), 42, 300)
    weight = packed.unpack().dequantize(torch.float64)
    x = torch.randn(2, 3, 300, dtype=torch.float64)
    assert torch.equal(linear(x, packed, None), x @ weight.T)
    grad = torch.randn(2, 3, 42, dtype=torch.float64)
    assert relative_error(input_grad(grad, packed), grad @ weight) < 1e-14
    for batch_invariant in (False, True):
        result = linear(torch.randn(2, 0, 300).half(), packed, None, batch_invariant=batch_invariant)
        assert result.shape == (2, 0, 42)
        assert result.dtype == torch.float16


def test_where_the_last_round_begins_is_of_one_shape(monkeypatch):
    config = {"kernel": "hopper", "block_n": 128, "split_k": 4, "split_from": 4224}
    monkeypatch.setattr(dispatch, "lookup", lambda *args: Entry(5120, 5120, 1, 512, "hopper", config, 1.0))
    dispatch._tuned.cache_clear()
    try:
        found = [dispatch._tuned(torch.device("cpu"), *shape, 1, 512) for shape in ((5120, 5120), (4096, 5120))]
    finally:
        dispatch._tuned.cache_clear()
    assert [(each.split_k, each.split_from) for each in found if each is not None] == [(4, 4224), (1, 0)]
