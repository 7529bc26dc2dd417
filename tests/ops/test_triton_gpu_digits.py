"""The kernel of 8-bit digits on any GPU that runs it, also one where the one-bit kernel is the faster."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DEVICE, LAYOUTS, NEEDS_KERNELS, TOLERANCE, error, random_input, random_weight, run

from optimum_arb.ops.backends.triton import available, digits, dispatch, gemm
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig
from optimum_arb.ops.backends.triton.launch import tensor_class

pytestmark = [
    *NEEDS_KERNELS,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not available.has_digits_kernel(DEVICE), reason="needs products of integers"
    ),
]
FUSABLE = [name for name, layout in LAYOUTS.items() if not layout.salient]


@pytest.fixture
def without_one_bit(monkeypatch):
    """As on a GPU without products of one bit that no table knows."""
    monkeypatch.setattr(dispatch, "_needing_digits", {DEVICE: True})
    monkeypatch.setattr(dispatch, "_tuned", lambda *args: None)


def check(x: torch.Tensor, packed, config: GemmConfig) -> torch.Tensor:
    bias = random_input(1, packed.out_features, x.dtype, seed=9)[0]
    weight = packed.unpack().dequantize(torch.float64)
    exact = x.double() @ weight.T
    # by the size of a sum of such terms of random signs: few rows may sum to anything
    size = (x.double().square() @ weight.square().T).sqrt().norm()
    found = digits.multiply(x, packed, None, torch.float32, config)
    assert (found - exact).norm() < 1e-4 * size
    result = gemm.gemm(x, packed, bias, config=config)
    assert result.dtype == x.dtype
    assert (result - (exact + bias.double())).norm() < TOLERANCE[x.dtype] * (size + bias.double().norm())
    assert torch.equal(gemm.gemm(x, packed, bias, config=config), result)  # the same bits again
    return found


def default(packed, m: int) -> GemmConfig:
    return digits.default_config(packed, m)


@pytest.mark.parametrize("name", FUSABLE)
def test_every_layout(name):
    packed = random_weight(name, 123, 300, permuted=True, prepared=False)
    whole = random_weight(name, 96, 512, prepared=False)
    for m, dtype in ((1, torch.float16), (4, torch.bfloat16), (16, torch.bfloat16)):
        for weight in (packed, whole):
            check(random_input(m, weight.in_features, dtype), weight, default(weight, m))


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "permuted"),
    [(1, 64, 64, False), (6, 192, 64, True), (42, 576, 128, False), (123, 4304, -1, True), (431, 576, 256, True)],
)
def test_shapes(rows, columns, block_size, permuted):
    packed = random_weight("planes-2-col", rows, columns, block_size=block_size, permuted=permuted, prepared=False)
    for m in (1, 3, 16):
        check(random_input(m, columns, torch.float16), packed, default(packed, m))


@pytest.mark.parametrize("m", [1, 4, 16])
def test_every_cut(m):
    """All that `tune` may find, and a row alone as in a batch."""
    packed = random_weight("planes-1-col", 431, 4096, permuted=True, prepared=False)
    x = random_input(16, 4096, torch.bfloat16)
    for config in sorted(set(digits.candidates(4096, 4096, m)), key=str):
        found = check(x[:m], packed, config)
        if m == 16:
            assert torch.equal(digits.multiply(x[3:8], packed, None, torch.float32, config), found[3:8])


def test_digits_are_those_of_a_cpu():
    """Bit for bit what they are defined as."""
    packed = random_weight("planes-1-col", 6, 300, permuted=True, prepared=False)
    x = random_input(2, 300, torch.float16)
    config = default(packed, 2)
    plan = digits.DigitsPlan(packed, 2, 300, tensor_class(x), x.dtype, None, DEVICE, config)
    stored = torch.empty(plan.digits, dtype=torch.int8, device=DEVICE)
    steps = torch.empty(plan.steps, device=DEVICE)
    plan.prepare(plan.prepare_arguments(x, stored, steps))
    assert packed.permutation is not None
    assert packed.col_scale is not None
    scaled = (x.float()[:, packed.permutation[0].long()] * packed.col_scale.float()).cpu()
    stored, steps = stored.cpu().view(3, 8, 2, 2, 16).int(), steps.cpu().view(3, 2)
    number = (stored[:, :, :, 0] * 256 + stored[:, :, :, 1]).transpose(1, 2)  # tile, token, bit, byte
    for tile, start in enumerate((0, 128)):
        values = scaled[:, start : start + 128]
        most = values.abs().amax(1)
        assert torch.equal(steps[tile], most / 32639)
        # a product and a sum may be one instruction there: halves are rounded either way
        exact = values.double() * (32639 / most)[:, None].double()
        assert ((number[tile].flatten(1) - exact).abs() <= 0.5 + 1e-2).all()


def test_not_a_number_reaches_the_result():
    packed = random_weight("planes-2-col", 160, 512, prepared=False)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for m in (1, 4, 16):
            x = random_input(m, 512, torch.float16)
            x[m - 1, 100] = bad
            result = gemm.gemm(x, packed, config=default(packed, m))
            assert not torch.isfinite(result[m - 1]).any()
            assert torch.isfinite(result[: m - 1]).all()


@pytest.mark.usefixtures("without_one_bit")
@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512), (16, 512), (17, 512)])
def test_operator(shape):
    packed = random_weight("planes-2-col", 160, 512, permuted=True, prepared=False)
    x = torch.randn(shape, device=DEVICE).half()
    result = run(x, packed)
    assert result.shape == (*shape[:-1], 160)
    assert error(result, x.double() @ packed.unpack().dequantize(torch.float64).T) < TOLERANCE[torch.float16]
    if x.numel() <= 16 * 512:
        flat = x.view(-1, 512)
        config = default(packed, len(flat))
        assert torch.equal(result.view(-1, 160), gemm.gemm(flat, packed, config=config))
        plan = dispatch.plan(x, packed, None)
        assert isinstance(plan, digits.DigitsPlan)
        for _ in range(3):
            assert torch.equal(plan.run(x, None), result)


@pytest.mark.usefixtures("without_one_bit")
@pytest.mark.parametrize("m", [1, 16])
def test_graph(m):
    """Launches that overlap one another, whose memory is used again at once."""
    first = random_weight("planes-2-col", 512, 512, permuted=True, prepared=False)
    second = random_weight("planes-1-col", 512, 512, prepared=False, seed=1)
    x = random_input(m, 512, torch.float16)

    def several() -> torch.Tensor:
        found = x
        for _ in range(4):
            found = run(run(found, first) / 32, second) / 32
        return found

    expected = several()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = several()
    for seed in range(3):
        x.copy_(random_input(m, 512, torch.float16, seed))
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        assert torch.equal(replayed, several())
    assert torch.isfinite(expected).all()
