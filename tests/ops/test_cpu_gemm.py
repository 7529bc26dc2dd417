"""Many bfloat16 tokens on the matrix unit or by AVX-512, against the weight in bfloat16 multiplied in float64."""

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts, bitmap_layout, planes_layout
from optimum_arb.ops.backends import cpu, reference
from optimum_arb.ops.backends.cpu import native
from optimum_arb.ops.backends.cpu.plan import plan_for, prepare_columns, tiles_for

pytestmark = pytest.mark.skipif("avx512-bf16" not in native.kernels(), reason="no products of bfloat16 on this machine")

LAYOUTS = {layout.name: layout for layout in all_layouts()}
PLANES = [planes_layout(1), planes_layout(1, col_scale=True), planes_layout(2, col_scale=True)]


@pytest.fixture(autouse=True, params=["avx512-bf16", "amx"])
def kernel(request, monkeypatch):
    if request.param not in native.kernels():
        pytest.skip("this machine has no matrix unit")
    monkeypatch.setattr(native, "best_kernel", lambda: request.param)


def tokens(m: int, packed) -> torch.Tensor:
    return torch.randn(m, packed.in_features, generator=torch.Generator().manual_seed(m)).bfloat16()


def columns(packed) -> torch.Tensor:
    tiles = tiles_for(packed.in_features, packed.block_size, native.LANES)
    return prepare_columns(torch.ones(1, packed.in_features), packed, plan_for(packed.layout.name), tiles)


def gemm(x: torch.Tensor, packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    return native.gemm(x, packed, columns(packed), bias)


def exact(x: torch.Tensor, packed, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes of the weight in bfloat16, in float64, and the size of its terms; both `[M, N]`."""
    tiles = tiles_for(packed.in_features, packed.block_size, native.LANES)
    out = torch.empty(packed.out_features, tiles.count, 8, native.LANES)
    weight = tiles.join(native.dequantize(columns(packed), packed, tiles, out)).bfloat16().double()
    x = x.double() if packed.permutation is None else x.double()[:, packed.permutation[0].long()]
    added = 0.0 if bias is None else bias.double()
    return x @ weight.T + added, x.abs() @ weight.abs().T + abs(added)


def check(m: int, packed, bias: torch.Tensor | None = None) -> None:
    x = tokens(m, packed)
    result = gemm(x, packed, bias)
    assert result.dtype == torch.bfloat16
    expected, size = exact(x, packed, bias)
    allowed = 1e-6 * size + torch.finfo(torch.bfloat16).eps / 2 * expected.abs() + 1e-35
    assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("m", [1, 15, 16, 17, 31, 32, 33, 48, 49, 70])
@pytest.mark.parametrize("layout", PLANES, ids=lambda layout: layout.name)
def test_every_number_of_tokens(layout, m, poisoned):
    check(m, random_packed(layout, 41, 300, permuted=True))


@pytest.mark.parametrize(("width", "block_size"), [(100, 128), (192, 64), (1096, 256), (430, -1), (200, 64), (3, 128)])
@pytest.mark.parametrize("rows", [1, 16, 31, 32, 33, 123])
def test_every_shape(rows, width, block_size, poisoned):
    check(20, random_packed(PLANES[2], rows, width, block_size, permuted=True))
    check(20, random_packed(PLANES[0], rows, width, block_size))


@pytest.mark.parametrize(("rows", "width", "m"), [(300, 2200, 40), (33, 4304, 33), (600, 192, 1100), (33, 192, 16384)])
@pytest.mark.parametrize("block_size", [64, 128, -1])
def test_several_blocks_of_rows_columns_and_tokens(rows, width, m, block_size, poisoned):
    check(m, random_packed(PLANES[2], rows, width, block_size, permuted=True))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not plan_for(name).salient_terms])
def test_every_layout_of_all_columns(name, poisoned):
    check(37, random_packed(LAYOUTS[name], 41, 300, permuted=True))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_with_what_the_salient_columns_alone_have(name, permuted, poisoned, monkeypatch):
    """As a layer runs it; the salient columns' own part is added to a sum that was rounded before."""
    monkeypatch.setattr(cpu, "choose_kernel", lambda *_: None)
    monkeypatch.setattr(cpu, "CHUNK_FLOATS", 500)
    packed = random_packed(LAYOUTS[name], 70, 576, permuted=permuted)
    x, bias = tokens(40, packed), torch.randn(70, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = cpu.linear(x.view(2, 20, 576), packed, bias).view(40, 70)
    expected = reference.linear(x.double(), packed, bias.double())
    # three roundings to bfloat16, 0.0017 to 0.0024 each: of the weight, of the sum, and once more with that part
    assert (result.double() - expected).norm() < 4.5e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_of_any_dtype(dtype):
    packed = random_packed(PLANES[1], 45, 300)
    check(20, packed, torch.randn(45, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_scales_of_any_dtype():
    packed = random_packed(PLANES[2], 45, 300)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scales = {name: getattr(packed, name).to(dtype) for name in ("row_scale", "col_scale")}
        check(20, type(packed)(**{**vars(packed), **scales}))


def test_input_of_any_stride():
    packed = random_packed(PLANES[1], 45, 300)
    x = tokens(600, packed)
    assert torch.equal(gemm(x[::2], packed), gemm(x[::2].contiguous(), packed))
    assert torch.equal(gemm(x.T.contiguous().T, packed), gemm(x, packed))


def test_a_permutation_of_wide_indices():
    packed = random_packed(PLANES[1], 45, 300, permuted=True)
    wide = type(packed)(**{**vars(packed), "permutation": packed.permutation.int()})
    narrow = type(packed)(**{**vars(packed), "permutation": packed.permutation.short()})
    x = tokens(40, packed)
    assert torch.equal(gemm(x, wide), gemm(x, narrow))


def test_no_tokens_and_no_rows():
    packed = random_packed(PLANES[1], 45, 300)
    assert gemm(tokens(0, packed), packed).shape == (0, 45)


def test_a_token_does_not_depend_on_the_others():
    packed = random_packed(bitmap_layout("all", True, False), 300, 2200)
    x = tokens(1100, packed)
    together = gemm(x, packed)
    for m in (0, 1, 15, 16, 33, 1023, 1024, 1099):
        assert torch.equal(gemm(x[m : m + 1], packed)[0], together[m])
    assert torch.equal(gemm(x[5:98], packed), together[5:98])


def test_threads_do_not_change_the_result():
    packed = random_packed(PLANES[2], 700, 2200)
    x, before = tokens(200, packed), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(gemm(x, packed))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_tokens_that_are_not_finite():
    """NaN in that row of the result alone."""
    packed = random_packed(PLANES[2], 45, 300)
    x = tokens(40, packed)
    expected = gemm(x, packed)
    x[3, 200], x[17, 7] = float("inf"), float("nan")
    result = gemm(x, packed)
    wrong = torch.tensor([m in (3, 17) for m in range(40)])
    assert not result[wrong].isfinite().any()
    assert torch.equal(result[~wrong], expected[~wrong])


def test_what_a_layer_takes_for_a_prompt(monkeypatch):
    """Products of bfloat16 without a copy of the weight."""
    packed = random_packed(PLANES[1], 45, 300)
    seen = []
    monkeypatch.setattr(native, "gemm", lambda *_: seen.append(True) or torch.zeros(512, 45))
    monkeypatch.setattr(native, "dequantize", lambda *_: pytest.fail("the weight was dequantized"))
    cpu.linear(tokens(512, packed), packed, None)
    assert seen
