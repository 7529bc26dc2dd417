"""Which kernel computes, in Triton's interpreter: what does not need a GPU of it."""

import math

import pytest
import torch
from packed_weights import random_packed, relative_error

from optimum_arb.format.layout import planes_layout
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
    monkeypatch.setattr(
        dispatch, "run_prepared", lambda rows, weight, bias, parts, change: asked.append((len(rows), parts))
    )
    x = torch.randn(17, 256).half()
    assert few_tokens(x[:1], [packed], None) is None
    prepack.make([packed])
    # as if the table said that the kernel for 5 to 16 tokens is the fastest, for the joined weights alone
    joined = prepack.make([packed, other])
    assert joined is not None
    joined.half.update({8: HalfConfig(), 16: HalfConfig(2)})
    for m in (0, 1, 4, 5):
        few_tokens(x[:m], [packed], None)
    for m in (2, 5, 8, 16, 17):
        few_tokens(x[:m], [packed, other], None)
    assert asked == [(1, (42,)), (4, (42,)), *[(m, (42, 7)) for m in (2, 5, 8, 16)]]


@pytest.fixture
def table(monkeypatch):
    """A table of a GPU: `[(n, half_bits)]` -> microseconds at 8 and at 16 tokens."""
    times: dict[tuple[int, bool], tuple[float, float]] = {}

    def lookup(device, n, k, planes, tokens, half_bits=False):
        known = [rows for rows, half in times if half == half_bits]
        if not known:
            return None
        nearest = min(known, key=lambda rows: abs(math.log2(rows / n)))
        config = {"groups": 2, "row_warps": 1} if half_bits else {}
        took = times[nearest, half_bits][tokens == 16]
        return Entry(nearest, k, planes, tokens, "half_bits" if half_bits else "hopper", config, took)

    monkeypatch.setattr(dispatch, "lookup", lookup)
    monkeypatch.setattr(dispatch, "has_half_bits_kernel", lambda device: True)
    monkeypatch.setattr(dispatch, "has_one_bit_kernel", lambda device: True)
    return times


def most_tokens(*rows: int) -> int:
    ready = dispatch.prepare([random_packed(planes_layout(1), n, 128) for n in rows])
    assert ready is not None
    return ready.most_tokens


def test_half_bits_where_it_is_the_fastest(table, monkeypatch):
    assert most_tokens(64) == 4  # nobody has measured it
    table[64, True] = (5.0, 6.0)
    assert most_tokens(64) == 16  # nobody has measured anything else
    table[64, False] = (7.0, 5.0)
    assert most_tokens(64) == 8
    table[64, False] = (4.0, 9.0)
    assert most_tokens(64) == 4
    table[64, False] = (7.0, 7.0)
    ready = dispatch.prepare([random_packed(planes_layout(1), 64, 128)])
    assert ready is not None
    assert ready.half == {8: HalfConfig(2, 1), 16: HalfConfig(2, 1)}
    monkeypatch.setattr(dispatch, "has_half_bits_kernel", lambda device: False)
    assert most_tokens(64) == 4


def test_half_bits_of_shapes_that_nobody_measured(table):
    """They keep the ratio of the nearest shape; joined ones are compared with one product after another."""
    table[64, True], table[64, False] = (5.0, 5.0), (4.0, 8.0)
    table[32, False] = (3.0, 3.0)
    assert most_tokens(48) == 4
    assert most_tokens(32, 32) == 16  # 5 and 5 against 6 and 6
    assert most_tokens(64, 64) == 4  # 10 against 8
    table[64, True], table[64, False] = (5.0, 9.0), (6.0, 8.0)
    assert most_tokens(96) == 8


@pytest.mark.parametrize("there", [True, False])
def test_tables_made_with_a_newer_triton(monkeypatch, there):
    """What they hold for a kernel that this Triton does not compile is not taken."""
    config = {"kernel": "hopper", "block_m": 64, "block_n": 64, "warps": 4, "stages": 3, "split_k": 1}
    monkeypatch.setattr(dispatch, "lookup", lambda *args: Entry(96, 256, 1, 64, "hopper", config, 1.0))
    monkeypatch.setattr(dispatch, "has_hopper", lambda: there)
    dispatch._tuned.cache_clear()
    try:
        found = dispatch._tuned(torch.device("cpu"), 96, 256, 1, 64)
    finally:
        dispatch._tuned.cache_clear()
    assert (None if found is None else found.kernel) == ("hopper" if there else None)
