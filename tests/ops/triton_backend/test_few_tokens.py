"""Which products take the kernels for few tokens, and what is prepared for them: what does not need a GPU of it."""

import math

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import few_tokens as module
from optimum_arb.ops.backends.triton import prepack
from optimum_arb.ops.backends.triton.few_tokens import few_tokens
from optimum_arb.ops.backends.triton.half_bits import HalfConfig
from optimum_arb.ops.backends.triton.table import Entry


def test_few_tokens_need_a_prepared_weight(monkeypatch):
    packed = random_packed(planes_layout(1), 42, 256)
    other = random_packed(planes_layout(1), 7, 256)
    asked = []
    monkeypatch.setattr(
        module, "run_prepared", lambda rows, weight, bias, parts, change: asked.append((len(rows), parts))
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
    """A table of a GPU: `[(n, half_bits)]` -> microseconds at 8 and at 16 tokens, and at 4 if they are there."""
    times: dict[tuple[int, bool], tuple[float, ...]] = {}

    def lookup(device, n, k, planes, tokens, half_bits=False):
        column = {8: 0, 16: 1, 4: 2}.get(tokens, 3)
        known = [rows for (rows, half), took in times.items() if half == half_bits and column < len(took)]
        if not known:
            return None
        nearest = min(known, key=lambda rows: abs(math.log2(rows / n)))
        config = {"warps": 4} if half_bits else {}
        took = times[nearest, half_bits][column]
        return Entry(nearest, k, planes, tokens, "half_bits" if half_bits else "hopper", config, took)

    monkeypatch.setattr(module, "lookup", lookup)
    monkeypatch.setattr(module, "has_half_bits_kernel", lambda device: True)
    monkeypatch.setattr(module, "has_one_bit_kernel", lambda device: True)
    monkeypatch.setattr(module, "has_hopper_kernel", lambda device: True)
    return times


def most_tokens(*rows: int) -> int:
    ready = module.prepare([random_packed(planes_layout(1), n, 128) for n in rows])
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
    ready = module.prepare([random_packed(planes_layout(1), 64, 128)])
    assert ready is not None
    assert ready.half == {8: HalfConfig(4), 16: HalfConfig(4)}
    monkeypatch.setattr(module, "has_half_bits_kernel", lambda device: False)
    assert most_tokens(64) == 4


def test_half_bits_of_three_and_four_tokens(table, monkeypatch):
    """Where it is faster than the one-bit kernel, as for the nearest shape that was measured."""
    table[64, True], table[64, False] = (5.0, 6.0, 4.0), (7.0, 7.0, 5.0)
    table[1024, True], table[1024, False] = (9.0, 9.0, 8.0), (9.5, 9.5, 7.0)
    weight = random_packed(planes_layout(1), 96, 128)
    ready = module.prepare([weight])
    assert ready is not None
    assert ready.half == {4: HalfConfig(4), 8: HalfConfig(4), 16: HalfConfig(4)}
    kernels = [type(module._plan(torch.zeros(m, 128), ready, None, None, None)).__module__ for m in range(1, 6)]
    assert [name.rsplit(".", 1)[1] for name in kernels] == ["one_bit"] * 2 + ["half_bits"] * 3
    other = module.prepare([random_packed(planes_layout(1), 600, 128)])
    assert other is not None
    assert other.half == {8: HalfConfig(4), 16: HalfConfig(4)}
    assert type(module._plan(torch.zeros(4, 128), other, None, None, None)).__module__.endswith("one_bit")
    monkeypatch.setattr(module, "has_half_bits_kernel", lambda device: False)
    alone = module.prepare([random_packed(planes_layout(1), 64, 128)])
    assert alone is not None
    assert alone.half == {}


def test_half_bits_where_the_faster_kernel_does_not_work(table, monkeypatch):
    table[64, True], table[64, False] = (5.0, 6.0), (4.0, 5.0)
    assert most_tokens(64) == 4
    monkeypatch.setattr(module, "has_hopper_kernel", lambda device: False)
    assert most_tokens(64) == 16


def test_half_bits_of_shapes_that_nobody_measured(table):
    """They keep the ratio of the nearest shape; joined ones are compared with one product after another."""
    table[64, True], table[64, False] = (5.0, 5.0), (4.0, 8.0)
    table[32, False] = (3.0, 3.0)
    assert most_tokens(48) == 4
    assert most_tokens(32, 32) == 16  # 5 and 5 against 6 and 6
    assert most_tokens(64, 64) == 4  # 10 against 8
    table[64, True], table[64, False] = (5.0, 9.0), (6.0, 8.0)
    assert most_tokens(96) == 8
