"""The launches that products of one input share, on a GPU: against float64, and bit for bit against each product alone.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_layers import NEEDS_KERNELS, TOLERANCE, error, random_input, random_weight

pytestmark = NEEDS_KERNELS
# block_m, block_n, warps, stages, split_k, tiles: small programs, two warpgroups, rows of a last round
CUTS = [(16, 64, 4, 3, 4, 2), (16, 128, 8, 4, 1, 2), (64, 128, 8, 3, 2, 1)]


def configs_of(cut, count: int, *, mixed: bool):
    from optimum_arb.ops.backends.triton.gemm_config import GemmConfig

    block_m, block_n, warps, stages, split_k, tiles = cut
    config = GemmConfig("hopper", block_m, block_n, warps, stages, split_k, tiles, True)
    if not mixed:
        return [config] * count
    others = [replace(config, split_k=3, split_from=block_n), replace(config, scale_input=False, split_k=2), config]
    return others[:count]


def check(weights, configs, tokens: int, dtype: torch.dtype, *, biased: bool, runs: int = 4) -> None:
    """Of the first run by Triton, and those by the native launcher where it was built."""
    from optimum_arb.ops.backends.triton.gemm import gemm, plan_group
    from optimum_arb.ops.backends.triton.gemm_config import fits_hopper

    if not all(fits_hopper(packed, dtype) for packed in weights):
        pytest.skip("not a GPU of compute capability 9.0")
    columns = weights[0].in_features
    biases = [random_input(1, packed.out_features, dtype, seed=9)[0] if biased else None for packed in weights]
    x = random_input(tokens, columns, dtype)
    group = plan_group(x, weights, biases, configs, None)
    assert group is not None
    for seed in range(runs):
        x = random_input(tokens, columns, dtype, seed)
        found = group.run(x)
        # the second begins in the memory of the first while that is still read, were it not waited for
        again = [group.run(x) for _ in range(3)]
        for i, (packed, config, bias) in enumerate(zip(weights, configs, biases, strict=True)):
            expected = x.double() @ packed.unpack().dequantize(torch.float64).T + (0 if bias is None else bias.double())
            assert error(found[i], expected) < TOLERANCE[dtype], (i, config)
            assert torch.equal(found[i], gemm(x, packed, bias, config=config)), (i, config)
            assert all(torch.equal(other[i], found[i]) for other in again), (i, config)


def weights_of(planes, rows, columns: int, *, permuted: bool):
    return [
        random_weight(f"planes-{count}-col", n, columns, permuted=permuted, seed=seed, prepared=False)
        for seed, (count, n) in enumerate(zip(planes, rows, strict=False))
    ]


@pytest.mark.parametrize("tokens", [1, 16, 33, 128, 512])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    ("planes", "dtype"), [((1, 1, 1), torch.float16), ((2, 2, 2), torch.bfloat16), ((3, 1), torch.float16)], ids=str
)
def test_as_each_alone(planes, dtype, permuted, mixed, tokens):
    weights = weights_of(planes, (1056, 431, 7), 2048, permuted=permuted)[: len(planes)]
    cut = CUTS[2] if tokens > 33 else CUTS[0]
    check(weights, configs_of(cut, len(planes), mixed=mixed), tokens, dtype, biased=tokens != 33)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("tokens", [5, 16])
def test_attention_of_a_7b(monkeypatch, tokens, beside):
    """As many programs as query, key and value have, none of which may read x before it was scaled."""
    from optimum_arb.ops.backends.triton import hopper_product

    monkeypatch.setattr(hopper_product, "BESIDE", beside)
    weights = weights_of((1, 1, 1), (4096, 4096, 4096), 4096, permuted=False)
    for cut in CUTS:
        check(weights, configs_of(cut, 3, mixed=False), tokens, torch.bfloat16, biased=False, runs=8)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("together", [2**24, 0])
def test_gated_mlp_of_a_7b(monkeypatch, together, beside):
    """Of two planes; side by side, and one after another in one place."""
    from optimum_arb.ops.backends.triton import hopper_group, hopper_product

    monkeypatch.setattr(hopper_product, "BESIDE", beside)
    monkeypatch.setattr(hopper_group, "TOGETHER", together)
    weights = weights_of((2, 2), (11008, 11008), 4096, permuted=False)
    check(weights, configs_of(CUTS[0], 2, mixed=False), 16, torch.bfloat16, biased=True)
    check(weights, configs_of(CUTS[2], 2, mixed=False), 64, torch.bfloat16, biased=True)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("tokens", [16, 64, 512])
def test_beside_each_other(monkeypatch, tokens, permuted):
    """Also where each has rows of a last round, as a product of its own, and more programs than there is room for."""
    from optimum_arb.ops.backends.triton import hopper_product

    monkeypatch.setattr(hopper_product, "BESIDE", True)
    weights = weights_of((2, 1, 1), (5120, 1056, 431), 5120, permuted=permuted)
    check(weights, configs_of(CUTS[2], 3, mixed=True), tokens, torch.bfloat16, biased=True)
