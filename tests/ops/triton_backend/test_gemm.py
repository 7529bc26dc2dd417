"""The fused product in plain Triton, in its interpreter, and the product by way of the dense weight."""

from dataclasses import replace

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.triton import gemm as module
from optimum_arb.ops.backends.triton.dense_plan import DensePlan
from optimum_arb.ops.backends.triton.dispatch import linear
from optimum_arb.ops.backends.triton.gemm import gemm, gemm_input_grad, plan
from optimum_arb.ops.backends.triton.gemm_config import (
    GemmConfig,
    candidates,
    is_fusable,
    last_round,
    scaled_candidates,
)

pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = {layout.name: layout for layout in all_layouts()}
PORTABLE = GemmConfig("portable", block_m=32, block_n=32)
# out_features, in_features, block_size, permuted
SHAPES = [
    (1, 64, 64, False),
    (6, 100, 128, True),
    (42, 192, 64, True),
    (123, 576, 128, False),
    (9, 576, 256, True),
    (3, 4304, -1, True),
    (431, 192, 128, True),
    (3, 3, 128, False),
]


def check(packed, m, dtype=torch.float16, bias=True, config=PORTABLE, out_dtype=None, strided=False):
    """Against float64, in units of the sum of the absolute products: the rounding of W and of the result."""
    generator = torch.Generator().manual_seed(m)
    rows, columns = packed.out_features, packed.in_features
    x = torch.randn(m, 2 * columns if strided else columns, generator=generator).to(dtype)[:, :columns]
    added = torch.randn(rows, generator=generator).to(dtype) if bias else None
    weight = packed.unpack().dequantize(torch.float64)
    expected = x.double() @ weight.T + (added.double() if bias else 0)
    size = x.double().abs() @ weight.abs().T + (added.double().abs() if bias else 0)
    result = gemm(x, packed, added, out_dtype, config=config)
    assert result.dtype == (out_dtype or dtype)
    assert result.shape == expected.shape
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert ((result.double() - expected).abs() <= eps * size + torch.finfo(result.dtype).eps * expected.abs()).all()
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    """Layouts with salient columns go by way of the dense weight, whatever the config says."""
    assert is_fusable(random_packed(LAYOUTS[name], 6, 300)) != LAYOUTS[name].salient
    check(random_packed(LAYOUTS[name], 6, 300, permuted=True), 17)
    check(random_packed(LAYOUTS[name], 6, 300, block_size=64), 5, torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns", "block_size", "permuted"), SHAPES)
@pytest.mark.parametrize("name", ["planes-2-col", "planes-3-mean"])
def test_shapes(name, rows, columns, block_size, permuted):
    check(random_packed(LAYOUTS[name], rows, columns, block_size, permuted=permuted), 19)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["portable", "dequantize"])
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes(dtype, kernel, bias):
    packed = random_packed(planes_layout(2, col_scale=True), 42, 192, permuted=True)
    check(packed, 33, dtype, bias, GemmConfig(kernel, block_m=32, block_n=32))
    check(packed, 33, dtype, bias, GemmConfig(kernel, block_m=32, block_n=32), out_dtype=torch.float32)


@pytest.mark.parametrize("m", [1, 31, 32, 33, 100])
def test_tokens(m):
    packed = random_packed(planes_layout(1, col_scale=True), 42, 192)
    result = check(packed, m, strided=True)
    again = check(packed, m, strided=True)
    assert torch.equal(result, again)


@pytest.mark.parametrize("split_k", [2, 3, 4, 8])
def test_split_columns(split_k):
    """Tiles that do not divide evenly among the programs, and fewer tiles than programs."""
    for columns in (700, 640, 128, 100):
        packed = random_packed(planes_layout(1), 20, columns)
        check(packed, 17, config=GemmConfig("portable", block_m=32, block_n=32, split_k=split_k))


def test_a_row_does_not_depend_on_the_others():
    packed = random_packed(planes_layout(2, col_scale=True), 42, 300)
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).half()
    whole = gemm(x, packed, config=PORTABLE)
    for m in (1, 20, 33):
        assert torch.equal(gemm(x[:m], packed, config=PORTABLE), whole[:m])


def test_no_tokens():
    packed = random_packed(planes_layout(1), 6, 192)
    assert gemm(torch.empty(0, 192).half(), packed).shape == (0, 6)


@pytest.mark.parametrize("name", ["planes-1", "planes-2-col", "groups-all-salient-mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_grad(name, dtype):
    packed = random_packed(LAYOUTS[name], 42, 300, permuted=name != "planes-1")
    grad = torch.randn(19, 42, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = packed.unpack().dequantize(torch.float64)
    result = gemm_input_grad(grad, packed)
    assert result.dtype == dtype
    size = grad.double().abs() @ weight.abs()
    eps = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert ((result.double() - grad.double() @ weight).abs() <= eps * size).all()


def test_candidates():
    for m in (17, 64, 512, 16384):
        for n, k in ((4096, 4096), (28672, 8192), (4096, 11008), (42, 192)):
            found = candidates(n, k, m)
            assert len(found) == len(set(found))
            assert all(config.split_k * 128 <= k for config in found if config.split_k > 1)


@pytest.mark.parametrize(
    ("planes", "permuted", "most"), [(1, False, 4096), (1, True, 0), (2, False, 128), (2, True, 128), (3, False, 128)]
)
def test_candidates_of_scaled_inputs(planes, permuted, most):
    """Every program that is timed without is timed with them, if with other splits."""
    for m in (8, 16, 32, 64, 128, 256, 4096):
        found = scaled_candidates(8192, 4096, m, planes, permuted)
        assert len(found) == len(set(found))
        assert bool(found) == (m <= most)
        assert all(config.kernel == "hopper" and config.scale_input for config in found)
        programs = {replace(config, scale_input=False, split_k=1) for config in found}
        alone = {replace(config, split_k=1) for config in candidates(8192, 4096, m) if config.kernel == "hopper"}
        assert not found or programs == alone


@pytest.mark.parametrize(
    ("n", "m", "block_n", "block_m", "expected"),
    [
        (5120, 512, 128, 128, (4224, 4)),  # 40 rows of 4 tiles: 33 of them are one round of 132, 7 x 4 x 4 are left
        (5120, 1024, 128, 256, (4224, 4)),
        (13824, 512, 128, 128, (12672, 3)),
        (11008, 512, 128, 128, (8448, 1)),  # 80 tiles are too many for two programs each
        (4096, 512, 128, 128, (0, 1)),  # less than a round
        (8448, 256, 128, 128, (0, 1)),  # a whole one
        (5123, 512, 128, 128, (4224, 4)),
    ],
)
def test_tiles_of_a_last_round(n, m, block_n, block_m, expected):
    assert last_round(n, m, block_n, block_m, 132) == expected


def test_candidates_that_divide_the_last_round():
    found = [config for config in candidates(5120, 5120, 512) if config.split_from]
    assert found
    for config in found:
        assert config.split_k > 1
        assert config.split_from % config.block_n == 0
        assert config.split_from < 5120
    assert not any(config.split_from for config in candidates(5120, 512, 512)), "too few columns to divide"
    assert not any(config.split_from for config in candidates(4096, 4096, 512))


def test_candidates_where_hopper_does_not_compute():
    for m in (1, 16, 64, 512):
        for n, k in ((4096, 4096), (28672, 8192), (42, 192)):
            found = candidates(n, k, m, hopper=False)
            assert len(found) == len(set(found))
            assert {config.kernel for config in found} == ({"portable"} if m < 32 else {"portable", "dequantize"})
            assert all(config.block_m <= 64 and config.split_k * 128 <= max(k, 128) for config in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "permuted"), [("planes-2-col", False), ("planes-1", True), ("groups-all-salient-col", True)]
)
def test_a_plan_by_the_dense_weight(name, permuted, dtype):
    """The bits of `gemm`, for inputs of any shape, with the weight as it is when it is called."""
    packed = random_packed(LAYOUTS[name], 42, 192, permuted=permuted)
    x = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = GemmConfig("dequantize")
    for bias in (None, torch.arange(42.0)):
        made = plan(x, packed, bias, config)
        assert isinstance(made, DensePlan)
        for each in (x, x.flip(0).contiguous()):
            expected = gemm(each.view(6, 192), packed, bias, config=config).view(2, 3, 42)
            assert torch.equal(made.run(each, bias), expected)
        before = made.run(x, bias)
        packed.row_scale.mul_(2)
        packed.weight[0] ^= 255
        assert torch.equal(made.run(x, bias), gemm(x.view(6, 192), packed, bias, config=config).view(2, 3, 42))
        assert not torch.equal(made.run(x, bias), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_keeps_dtypes(dtype):
    """A planned prompt had autocast's, and few tokens the input's."""
    packed = random_packed(LAYOUTS["planes-2-col"], 42, 192)
    x, bias, config = torch.randn(6, 192).to(dtype), torch.arange(42.0), GemmConfig("dequantize")
    made = plan(x, packed, bias, config)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", other):
        found = made.run(x, bias)
        assert found.dtype == dtype
        assert torch.equal(found, gemm(x, packed, bias, config=config))
        assert gemm_input_grad(found, packed).dtype == dtype
        assert linear(x, packed, bias, batch_invariant=True).dtype == dtype


def test_what_has_no_plan():
    packed, x = random_packed(LAYOUTS["planes-2"], 42, 192), torch.ones(3, 192)
    assert plan(x.double(), packed, None, GemmConfig("dequantize")) is None
    assert plan(x.half(), packed, None, PORTABLE) is None
    strided = replace(packed, row_scale=packed.row_scale.T.contiguous().T)
    assert not strided.row_scale.is_contiguous()
    assert plan(x, strided, None, GemmConfig("dequantize")) is None


def test_rows_that_the_copy_engine_takes(monkeypatch):
    """Of `hopper`: 16-byte rows apart from one another; all others are copied."""
    seen = []

    class Plan:
        def __init__(self, packed, tokens, stride, *rest):
            seen.append(stride)

        def run(self, x, bias):
            assert x.stride(0) == seen[-1]
            return x

    monkeypatch.setattr(module, "HopperPlan", Plan)
    monkeypatch.setattr(module, "fits_hopper", lambda packed, dtype: True)
    packed = random_packed(planes_layout(1), 6, 256)
    wide = torch.randn(64, 520).half()
    inputs = [
        wide[:, :256],
        wide[:, 1:257],
        wide[:1, :256].expand(64, 256),
        wide.view(-1)[: 63 * 8 + 256].unfold(0, 256, 8),
    ]
    for x in inputs:
        assert torch.equal(gemm(x, packed, config=GemmConfig("hopper")), x)
    assert seen == [520, 256, 256, 256]
