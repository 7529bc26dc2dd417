"""Products of one input against each alone, bit by bit: computed by torch, what is around them in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_weights import random_packed

pytest.importorskip("triton.experimental.gluon")
from emulated_products import EmulatedMultiply

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import hopper, hopper_group, hopper_product
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, split_of
from optimum_arb.ops.backends.triton.hadamard import Transform
from optimum_arb.ops.backends.triton.hopper_group import HopperGroup
from optimum_arb.ops.backends.triton.hopper_plan import HopperPlan

pytestmark = pytest.mark.usefixtures("poisoned", "emulated")
CPU = torch.device("cpu")
WHOLE = GemmConfig("hopper", 16, 64, 4, 3, 1)
SPLIT = replace(WHOLE, split_k=3)
SCALED = replace(WHOLE, scale_input=True)
BOTH = replace(SCALED, split_k=2)
LAST_ROWS = replace(BOTH, split_k=3, split_from=64)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(hopper, "Multiply", EmulatedMultiply)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # not in every build of torch


def group_of(weights, configs, biases, tokens: int, dtype, transform=None) -> HopperGroup:
    splits = [split_of(config, packed) for config, packed in zip(configs, weights, strict=True)]
    return HopperGroup(weights, biases, tokens, dtype, CPU, splits, configs, transform)


def check(weights, configs, tokens: int, dtype, *, biased: bool = True, block: int = 0) -> HopperGroup:
    """The group, whose results are those of each product alone."""
    columns = weights[0].in_features
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    biases = [torch.randn(packed.out_features, generator=generator).to(dtype) if biased else None for packed in weights]
    transform, given = None, x
    if block:
        order = torch.randperm(columns, generator=generator).to(torch.int16)[None]
        sign = torch.where(torch.rand(columns, generator=generator) < 0.5, -1, 1).to(torch.int8)
        transform = Transform(order, sign, block, tokens, columns, columns, (dtype, True), CPU)
        given = transform(x)
    group = group_of(weights, configs, biases, tokens, dtype, transform)
    for found, packed, config, bias in zip(group.run(x), weights, configs, biases, strict=True):
        assert found.shape == (tokens, packed.out_features)
        split_k = split_of(config, packed)
        alone = HopperPlan(packed, tokens, columns, (dtype, True), dtype, bias, CPU, split_k, config)
        assert torch.equal(found, alone.run(given, bias)), config
        expected = given.double() @ packed.unpack().dequantize(torch.float64).T + (0 if bias is None else bias.double())
        # to bfloat16 the interpreter cuts
        assert (found - expected).norm() < (1e-3 if dtype == torch.float16 else 1e-2) * expected.norm(), config
    return group


def weights_of(planes, rows, columns: int = 384, *, permuted: bool = False, **choices):
    return [
        random_packed(planes_layout(count, col_scale=True), n, columns, permuted=permuted, seed=seed, **choices)
        for seed, (count, n) in enumerate(zip(planes, rows, strict=True))
    ]


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("planes", [(1, 1, 1), (2, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("configs", [(SCALED,) * 3, (BOTH, WHOLE, SPLIT), (SPLIT, LAST_ROWS, SCALED)], ids=range(3))
def test_as_each_alone(configs, planes, permuted, tokens):
    rows = (160, 33, 7)[: len(planes)]
    weights, configs = weights_of(planes, rows, permuted=permuted), configs[: len(planes)]
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    group = check(weights, configs, tokens, dtype, biased=tokens != 5)
    assert sum(copy.gather is not None for copy in group.copies) == 1
    assert len(group._sums) == any(config.split_k > 1 for config in configs)


@pytest.mark.parametrize(("planes", "tokens", "columns"), [((2, 1, 3), 70, 384), ((1, 1), 512, 128)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_many_tokens(permuted, planes, tokens, columns):
    """Whole rows are brought into an order of columns."""
    weights = weights_of(planes, (33, 160, 7)[: len(planes)], columns, permuted=permuted)
    check(weights, (BOTH, LAST_ROWS, SCALED)[: len(planes)], tokens, torch.float16)


@pytest.mark.parametrize("block_size", [128, 256, -1])
def test_block_sizes(block_size):
    weights = weights_of((1, 2, 3), (7, 160, 33), 768, block_size=block_size, permuted=True)
    check(weights, (LAST_ROWS, BOTH, SCALED), 9, torch.float16)


@pytest.mark.parametrize("scaled", [False, True])
def test_after_a_transform(scaled):
    configs = (BOTH, SCALED) if scaled else (SPLIT, WHOLE)
    check(weights_of((1, 2), (160, 33)), configs, 9, torch.float16, block=128)


@pytest.mark.parametrize(("tokens", "permuted"), [(5, False), (5, True), (70, True)])
def test_one_after_another(monkeypatch, tokens, permuted):
    """Of more bytes than are to lie side by side; then all use one place in turn."""
    weights = weights_of((2, 2, 1), (33, 160, 7), permuted=permuted)
    joined = check(weights, (BOTH, LAST_ROWS, BOTH), tokens, torch.float16)
    monkeypatch.setattr(hopper_group, "TOGETHER", 1000)
    group = check(weights, (BOTH, LAST_ROWS, BOTH), tokens, torch.float16)
    assert [copy.weights for copy in group.copies] == [[0], [1], [2]]
    assert [of for _, of in group._sums.values()] == [[0], [1], [2]]
    assert [copy.weights for copy in joined.copies] == [[0, 1, 2], [], []]
    assert [of for _, of in joined._sums.values()] == [[0, 1, 2]]
    assert group.scratch < joined.scratch


@pytest.mark.parametrize("together", [2**24, 0])
def test_one_order_is_gathered_once(monkeypatch, together):
    monkeypatch.setattr(hopper_group, "TOGETHER", together)
    weights = weights_of((2, 2, 2), (160, 33, 7), permuted=True)
    weights[1].permutation = weights[0].permutation.clone()
    group = check(weights, (WHOLE, SPLIT, SPLIT), 9, torch.float16)
    assert [copy.weights for copy in group.copies] == ([[0, 2], [], []] if together else [[0], [], [2]])
    before = group.copies
    weights[1].permutation.copy_(weights[1].permutation.flip(-1))
    x = torch.randn(9, 384).half()
    found = group.run(x)
    assert group.copies is not before, "the order of columns is that of before"
    again = group_of(weights, (WHOLE, SPLIT, SPLIT), group.biases, 9, torch.float16)
    assert all(torch.equal(one, other) for one, other in zip(found, again.run(x), strict=True))


@pytest.mark.parametrize(
    ("configs", "together", "expected"),
    [
        # a second piece of a product always comes after its first, which waited
        ((SCALED, SCALED, SCALED), 2**24, [[False], [True], [True]]),
        ((BOTH, LAST_ROWS, BOTH), 2**24, [[False], [True, True], [True]]),
        ((BOTH, LAST_ROWS, BOTH), 0, [[False], [False, True], [False]]),  # a gather before each, a sum behind
        ((WHOLE, WHOLE, WHOLE), 0, [[False], [True], [True]]),
        ((SPLIT, WHOLE, SPLIT), 0, [[False], [False], [True]]),
        ((WHOLE, SCALED, WHOLE), 0, [[False], [False], [True]]),
    ],
    ids=range(6),
)
def test_which_products_compute_beside_another(monkeypatch, configs, together, expected):
    monkeypatch.setattr(hopper_product, "BESIDE", True)
    monkeypatch.setattr(hopper_group, "TOGETHER", together)
    group = check(weights_of((1, 2, 1), (33, 160, 7)), configs, 9, torch.float16)
    assert [[piece.multiply.after_product for piece in product.pieces] for product in group.products] == expected
    launches = [
        launch for launch, _ in group.launches(torch.zeros(9, 384).half(), [torch.zeros(1)] * 3, lambda *_: None)
    ]
    multiplies = [piece.multiply for product in group.products for piece in product.pieces]
    for multiply in multiplies:
        if multiply.after_product:
            before = launches[launches.index(multiply.launch) - 1]
            assert any(before == other.launch for other in multiplies), "a gather or a sum before it"


def test_places():
    sizes = [1000, 0, 513]
    assert hopper_group._places(sizes, 512) == ([512, 1536, 1536], 2560, True)
    assert hopper_group._places([2**24, 0, 1], 512) == ([512] * 3, 512 + 2**24, False)
    assert hopper_group._places([0, 0], 0) == ([0, 0], 0, True)
