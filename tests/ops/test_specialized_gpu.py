"""The product of many tokens whose weights one warpgroup decodes for two others, on a GPU; run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DEVICE, LAYOUTS, NEEDS_KERNELS, TOLERANCE, error, random_input, random_weight
from torch import nn

from optimum_arb.ops.backends.triton.gemm import gemm, plan, plan_group
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, fits_hopper

pytestmark = [
    *NEEDS_KERNELS,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs an sm_90"
    ),
]
# tokens and rows of a tile, stages
FORMS = [(128, 256, 4), (128, 128, 6), (256, 128, 4), (128, 128, 2)]
BF16, FP16 = torch.bfloat16, torch.float16


def config(form: tuple[int, int, int], split_k: int = 1) -> GemmConfig:
    block_m, block_n, stages = form
    return GemmConfig("hopper", block_m, block_n, 12, stages, split_k, specialized=True)


def check(packed, m, dtype, form, *, bias=None, split_k=1, out_dtype=None, x=None):
    """Against float64, twice for the same bits, in memory that was full of NaN."""
    assert fits_hopper(packed, dtype)
    x = random_input(m, packed.in_features, dtype) if x is None else x
    expected = nn.functional.linear(x.double(), packed.unpack().dequantize(torch.float64))
    if bias is not None:
        expected += bias.double()
    chosen = config(form, split_k)
    result = gemm(x, packed, bias, out_dtype, config=chosen)
    assert error(result, expected) < TOLERANCE[dtype]
    for _ in range(3):
        torch.empty_like(result)  # full of NaN, see `poisoned`
        assert torch.equal(gemm(x, packed, bias, out_dtype, config=chosen), result)
    return result


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("planes-")])
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_every_layout(name, form):
    for dtype, permuted in ((BF16, False), (FP16, True)):
        packed = random_weight(name, 272, 640, prepared=False, permuted=permuted)
        check(packed, 300, dtype, form, bias=random_input(1, 272, dtype, seed=9)[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "m", "block_size"),
    [
        (8, 128, 1, 128),
        (123, 384, 257, 256),
        (256, 128, 128, 128),
        (431, 2432, 511, -1),
        # several tiles of the result a program, of fewer and of more packing tiles than the rings hold
        (4500, 128, 2049, 128),
        (4500, 384, 2049, 128),
        (3000, 1152, 2049, 128),
    ],
)
def test_shapes(rows, columns, m, block_size, form):
    packed = random_weight("planes-2-col", rows, columns, block_size=block_size, prepared=False)
    check(packed, m, BF16, form, bias=random_input(1, rows, BF16, seed=9)[0])


@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_split_columns(split_k):
    packed = random_weight("planes-3-mean", 272, 1920, prepared=False)
    for form in FORMS[:3]:
        check(packed, 200, FP16, form, bias=random_input(1, 272, FP16, seed=9)[0], split_k=split_k)


def test_dtypes_of_results_and_biases():
    packed = random_weight("planes-1-col", 272, 640, prepared=False)
    for bias in (None, torch.randn(272, device=DEVICE), torch.randn(273, device=DEVICE).half()[1:]):
        for out_dtype in (None, torch.float32):
            check(packed, 150, FP16, FORMS[0], bias=bias, out_dtype=out_dtype)


def test_strided_input():
    packed = random_weight("planes-2-col", 272, 640, prepared=False)
    wide = random_input(300, 1288, BF16)
    for x in (wide[:, :640], wide[:, 1:641], wide[:, :1280:2], wide[:1, :640].expand(300, 640)):
        check(packed, 300, BF16, FORMS[0], x=x)


def test_not_a_number_stays_in_its_row():
    packed = random_weight("planes-2-col", 272, 640, prepared=False)
    x = random_input(300, 640, BF16)
    x[200, 100] = float("nan")
    for form in FORMS:
        result = gemm(x, packed, config=config(form))
        assert not torch.isfinite(result[200]).any()
        assert torch.isfinite(result[:200]).all()
        assert torch.isfinite(result[201:]).all()


def test_the_same_bits_many_times():
    """A barrier that is passed too early shows now and then, where many programs run one after another."""
    packed = random_weight("planes-2-col", 4096, 4096, prepared=False)
    x = random_input(2048, 4096, BF16)
    for form in FORMS:
        first = check(packed, 2048, BF16, form, x=x)
        for _ in range(50):
            assert torch.equal(gemm(x, packed, config=config(form)), first)


@pytest.mark.parametrize("name", ["planes-1-col", "planes-2-col", "planes-3-mean"])
@pytest.mark.parametrize("permuted", [False, True])
def test_made_ready(name, permuted):
    """By Triton's launch and then by the native ones."""
    packed = random_weight(name, 272, 640, prepared=False, permuted=permuted)
    x, bias = random_input(300, 640, BF16), random_input(1, 272, BF16, seed=9)[0]
    for form in FORMS:
        expected = check(packed, 300, BF16, form, bias=bias, x=x)
        made = plan(x, packed, bias, config(form))
        assert made is not None
        for _ in range(4):
            assert torch.equal(made.run(x, bias), expected)


@pytest.mark.parametrize("permuted", [False, True])
def test_joined(permuted):
    """Several products of one input, by Triton's launches and then by the native ones."""
    rows = (256, 48, 130)
    weights = [
        random_weight("planes-2-col", count, 640, prepared=False, permuted=permuted, seed=seed)
        for seed, count in enumerate(rows)
    ]
    biases = [random_input(1, count, BF16, seed=count)[0] for count in rows]
    x = random_input(300, 640, BF16)
    group = plan_group(x, weights, biases, [config(form) for form in FORMS[:3]], None)
    assert group is not None
    first = group.run(x)
    for packed, bias, result in zip(weights, biases, first, strict=True):
        expected = nn.functional.linear(x.double(), packed.unpack().dequantize(torch.float64), bias.double())
        assert error(result, expected) < TOLERANCE[BF16]
    for _ in range(3):
        for result, again in zip(first, group.run(x), strict=True):
            assert torch.equal(result, again)
