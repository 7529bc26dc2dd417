"""Which kernel computes, in Triton's interpreter: what does not need a GPU of it."""

import pytest
import torch
from packed_weights import random_packed, relative_error

from optimum_arb.layout import planes_layout
from optimum_arb.ops.backends.triton import dispatch, prepack
from optimum_arb.ops.backends.triton.dispatch import few_tokens, input_grad, linear
from optimum_arb.ops.backends.triton.half_bits import HalfConfig
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


def test_few_tokens_need_a_prepared_weight(monkeypatch):
    packed = random_packed(planes_layout(1), 42, 256)
    other = random_packed(planes_layout(1), 7, 256)
    asked = []
    monkeypatch.setattr(dispatch, "run_prepared", lambda rows, weight, bias, parts: asked.append((len(rows), parts)))
    # as if the table had an entry of the kernel for 5 to 16 tokens, for the joined weights alone
    known = {(49, 8): HalfConfig(), (49, 16): HalfConfig(2)}
    monkeypatch.setattr(dispatch, "_half_config", lambda device, n, k, planes, tokens: known.get((n, tokens)))
    x = torch.randn(17, 256).half()
    assert few_tokens(x[:1], [packed], None) is None
    prepack.make([packed])
    prepack.make([packed, other])
    for m in (0, 1, 4, 5):
        few_tokens(x[:m], [packed], None)
    for m in (2, 5, 8, 16, 17):
        few_tokens(x[:m], [packed, other], None)
    assert asked == [(1, (42,)), (4, (42,)), *[(m, (42, 7)) for m in (2, 5, 8, 16)]]


def test_half_bits_where_it_is_the_fastest(monkeypatch):
    def lookup(device, n, k, planes, tokens, half_bits=False):
        took = {(4096, True): 5.0, (4096, False): 9.0, (64, True): 3.0, (64, False): 2.0, (7, True): 1.0}
        if (n, half_bits) not in took:
            return None
        config = {"groups": 2, "row_warps": 1} if half_bits else {}
        return Entry(n, k, planes, tokens, "half_bits" if half_bits else "hopper", config, took[n, half_bits])

    monkeypatch.setattr(dispatch, "lookup", lookup)
    dispatch._half_config.cache_clear()
    found = {n: dispatch._half_config(torch.device("cpu"), n, 4096, 2, 8) for n in (4096, 64, 7, 3)}
    dispatch._half_config.cache_clear()
    assert found == {4096: HalfConfig(2, 1), 64: None, 7: HalfConfig(2, 1), 3: None}
