"""The GPU kernels through the operator: products, gradients, streams, graphs and devices.

Run with `pytest -m gpu` where there is a GPU. Most of the time is compilation, a second a kernel: with pytest-xdist
`-n 8` it is shared among processes.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from gpu_layers import (
    DEVICE,
    LAYOUTS,
    NEEDS_KERNELS,
    TOLERANCE,
    check,
    error,
    module,
    random_input,
    random_weight,
    run,
)

from optimum_arb.ops.backends.triton.available import has_one_bit_kernel

pytestmark = NEEDS_KERNELS
EVERY_M = (1, 2, 3, 4, 5, 16, 33)


# Products


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    packed = random_weight(name, 123, 300, permuted=True)
    for m, dtype in ((1, torch.float16), (4, torch.bfloat16), (16, torch.bfloat16), (5, torch.float32)):
        check(random_input(m, 300, dtype), packed)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-col"])
def test_every_number_of_tokens(name, dtype):
    packed = random_weight(name, 160, 512)
    for m in EVERY_M:
        check(random_input(m, 512, dtype), packed)


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "permuted"),
    [(6, 64, 64, False), (42, 192, 64, True), (123, 576, 256, False), (9, 4304, -1, True), (2, 3, 128, True)],
)
def test_shapes(rows, columns, block_size, permuted):
    packed = random_weight("planes-2-col", rows, columns, block_size=block_size, permuted=permuted)
    for m in (1, 3, 5):
        check(random_input(m, columns, torch.float16), packed)


@pytest.mark.parametrize("m", [1, 2, 33])
def test_without_a_prepared_copy(m):
    check(random_input(m, 512, torch.float16), random_weight("planes-1", 160, 512, prepared=False))


@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 1, 512), (2, 3, 512), (0, 512), (2, 0, 512)])
def test_batch_shapes(shape):
    packed = random_weight("planes-2-col", 160, 512)
    x = torch.randn(shape, device=DEVICE).half()
    result = run(x, packed)
    assert result.shape == (*shape[:-1], 160)
    if result.numel():
        assert error(result, x.double() @ packed.unpack().dequantize(torch.float64).T) < 1e-3


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("m", [2, 5, 40, 300])
def test_strided_input(m, permuted):
    packed = random_weight("planes-2-col", 160, 512, permuted=permuted)
    base = random_input(512, m, torch.float16)
    wide = random_input(m, 1024, torch.float16)
    for x in (base.T, wide[:, ::2], wide[:, :512], wide[:, 3:515], wide[:1, :512].expand(m, 512)):
        check(x, packed)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("m", [3, 6])
def test_rows_that_lie_far_apart(m, permuted):
    """As the last tokens of long prompts: 2^31 elements from the first row to the last."""
    packed = random_weight("planes-2-col", 160, 512, permuted=permuted)
    apart = 2**31 // (m - 1)
    memory = torch.empty((m - 1) * apart + 512, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((m, 512), (apart, 1))
    x.copy_(random_input(m, 512, torch.float16))
    check(x, packed)


def test_not_a_number_reaches_the_result():
    packed = random_weight("planes-2-col", 160, 512)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for m in (1, 4, 16):
            x = random_input(m, 512, torch.float16)
            x[m - 1, 100] = bad
            result = run(x, packed)
            assert not torch.isfinite(result[m - 1]).any()
            assert torch.isfinite(result[: m - 1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["planes-1", "groups-non-salient-salient-mean"])
def test_a_row_does_not_depend_on_the_others(name, dtype):
    """With one way of cutting the work; the table may have several for several numbers of tokens."""
    from optimum_arb.ops.backends.triton import one_bit, prepack

    if not has_one_bit_kernel(DEVICE):
        pytest.skip("no one-bit kernel on this device")
    weight = prepack.prepack(random_weight(name, 160, 512, prepared=False))
    x = random_input(4, 512, dtype)
    for config in (one_bit.DecodeConfig(), one_bit.DecodeConfig(groups=2, warps=4, ahead=1)):
        whole = one_bit.decode(x, weight, None, config).view(4, 160)
        for m in (1, 2, 3):
            for start in range(5 - m):
                some = one_bit.decode(x[start : start + m], weight, None, config).view(m, 160)
                assert torch.equal(some, whole[start : start + m])


@pytest.mark.parametrize(
    ("name", "columns", "dtype"),
    [
        ("planes-2-col", 512, torch.bfloat16),
        ("planes-1", 300, torch.float16),
        ("groups-all-salient-col", 512, torch.bfloat16),
        ("planes-1", 512, torch.float32),
    ],
    ids=str,
)
def test_batch_invariant(name, columns, dtype):
    packed = random_weight(name, 160, columns, permuted=True)
    x = random_input(64, columns, dtype)
    whole = check(x, packed, "triton:batch-invariant")
    bias = random_input(1, 160, dtype, seed=9)[0]
    for m in range(1, 65):
        assert torch.equal(run(x[:m], packed, bias, "triton:batch-invariant"), whole[:m]), m
    assert torch.equal(run(x[13:20], packed, bias, "auto:batch-invariant"), whole[13:20])


def check_before_the_product(packed, m: int, dtype: torch.dtype, configs, biased: bool = True) -> None:
    """With x scaled by a launch of its own, the same bits twice, and for fewer rows of x."""
    from optimum_arb.ops.backends.triton.gemm import gemm
    from optimum_arb.ops.backends.triton.gemm_config import fits_hopper

    if not fits_hopper(packed, dtype):
        pytest.skip("not a GPU of compute capability 9.0")
    x = random_input(m, packed.in_features, dtype)
    bias = random_input(1, packed.out_features, dtype, seed=9)[0] if biased else None
    expected = x.double() @ packed.unpack().dequantize(torch.float64).T + (0 if bias is None else bias.double())
    for config in configs:
        config = replace(config, scale_input=True)
        found = gemm(x, packed, bias, config=config)
        assert error(found, expected) < TOLERANCE[dtype], config
        for rows in (slice(0, m), slice(0, 1), slice(m // 2, m)):
            assert torch.equal(gemm(x[rows], packed, bias, config=config), found[rows]), config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [8, 33, 64, 128, 600])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_column_scales_before_the_product(planes, m, dtype):
    from optimum_arb.ops.backends.triton.gemm_config import candidates

    configs = [config for config in candidates(8192, 4096, m) if config.kernel == "hopper"]
    check_before_the_product(random_weight(f"planes-{planes}-col", 160, 512), m, dtype, configs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("planes", "rows", "columns", "block_size", "permuted"),
    [
        (2, 1, 128, 128, True),
        (2, 6, 384, 128, False),
        (2, 42, 1152, 256, True),
        (2, 123, 640, -1, False),
        (2, 431, 4224, 512, True),
        (3, 6, 128, 128, False),
        (3, 123, 384, 256, True),
        (3, 431, 1152, -1, True),
    ],
)
def test_shapes_of_column_scales_before_the_product(planes, rows, columns, block_size, permuted, dtype):
    from optimum_arb.ops.backends.triton.gemm_config import GemmConfig

    packed = random_weight(f"planes-{planes}-col", rows, columns, block_size=block_size, permuted=permuted)
    # numbers of tiles that the tiles of a slot and the programs of a product do not divide
    configs = [GemmConfig("hopper", 16, 64, 4, 3, 1, 2), GemmConfig("hopper", 64, 128, 8, 3, 1, 2)]
    for split_k in (3, 16):
        configs.append(GemmConfig("hopper", 32, 64, 4, 4, split_k, 1))
        configs.append(GemmConfig("hopper", 32, 128, 8, 4, split_k, 2))
    check_before_the_product(packed, 19, dtype, configs)
    check_before_the_product(packed, 70, dtype, configs, biased=False)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", ["planes-1-col", "planes-2-col", "planes-3-mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_of_a_last_round(dtype, name, permuted):
    """Rows from `split_from` on are computed in parts, the ones before in one."""
    from optimum_arb.ops.backends.triton.gemm import gemm
    from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, fits_hopper

    for rows in (431, 384, 136):
        packed = random_weight(name, rows, 1024, permuted=permuted)
        if not fits_hopper(packed, dtype):
            pytest.skip("not a GPU of compute capability 9.0")
        dense = packed.unpack().dequantize(torch.float64)
        for m, block_m, block_n, stages in ((200, 128, 128, 4), (600, 256, 128, 3), (64, 64, 64, 3)):
            warps = 8 if block_n == 128 else 4
            x = random_input(m, 1024, dtype)
            for bias in (None, random_input(1, rows, dtype, seed=9)[0]):
                expected = torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
                whole = gemm(x, packed, bias, config=GemmConfig("hopper", block_m, block_n, warps, stages))
                for parts in (2, 3):
                    config = GemmConfig("hopper", block_m, block_n, warps, stages, parts, split_from=128)
                    found = gemm(x, packed, bias, config=config)
                    assert error(found, expected) < TOLERANCE[dtype], config
                    assert torch.equal(found[:, :128], whole[:, :128])
                    assert torch.equal(gemm(x, packed, bias, config=config), found)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-mean"])
def test_gradients(name, dtype):
    packed = random_weight(name, 160, 512, permuted=True)
    weight = packed.unpack().dequantize(torch.float64)
    for m in (1, 33):
        x = random_input(m, 512, dtype).requires_grad_()
        bias = torch.zeros(160, device=DEVICE, dtype=dtype, requires_grad=True)
        upstream = random_input(m, 160, dtype, seed=1)
        x_grad, bias_grad = torch.autograd.grad(run(x, packed, bias), (x, bias), upstream)
        assert x_grad.dtype == dtype
        assert error(x_grad, upstream.double() @ weight) < TOLERANCE[dtype]
        assert error(bias_grad, upstream.double().sum(0)) < TOLERANCE[dtype]


# Streams, graphs, devices


@torch.no_grad()
def test_graph():
    layer = module()
    x = random_input(1, 512, torch.float16)
    layer(x)  # prepares, compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(layer(x)[:, :1].expand(1, 512) + x)
    for seed in range(3):
        x.copy_(random_input(1, 512, torch.float16, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, layer(layer(x)[:, :1].expand(1, 512) + x))


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 16])
def test_two_streams(m):
    """The same layer at the same time, with inputs of their own."""
    layer = module(rows=2048, columns=2048)
    inputs = [random_input(m, 2048, torch.float16, seed) for seed in range(2)]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(DEVICE) for _ in inputs]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for x, stream, found in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer(x))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(result, wanted) for result in found)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "dequantize"])
@pytest.mark.parametrize("m", [1, 64])
def test_first_calls_on_two_streams(m, backend):
    """What the first call makes and keeps is whole where the second one reads it."""
    layer = module(rows=2048, columns=2048).bfloat16()
    layer.backend = backend
    x = random_input(m, 2048, torch.bfloat16)
    expected = copy.deepcopy(layer)(x)
    first, second = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        found = [layer(x)]
    with torch.cuda.stream(second):
        found.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in found)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    """Whichever is the current one."""
    layer = module()
    second = torch.device("cuda", 1)
    other = copy.deepcopy(layer).to(second)
    for m in (1, 5, 33):
        x = random_input(m, 512, torch.float16)
        expected = layer(x)
        for current in (0, 1):
            with torch.cuda.device(current):
                result = other(x.to(second))
                assert result.device == second
                assert torch.equal(result.to(DEVICE), expected)
                assert torch.equal(layer(x), expected)
