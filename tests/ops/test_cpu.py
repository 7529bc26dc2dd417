"""The CPU backend against the reference backend in float64."""

import importlib.machinery
import shutil
import subprocess
import warnings
from contextlib import contextmanager

import pytest
import torch
from packed_weights import random_packed, relative_error

from optimum_arb.format.layout import all_layouts, bitmap_layout, planes_layout
from optimum_arb.format.packing import pack_bits
from optimum_arb.ops.backends import cpu, reference
from optimum_arb.ops.backends.cpu import lookup, native
from optimum_arb.ops.backends.cpu.plan import Tiles, choose_kernel, plan_for, prepare_columns, tiles_for

# out_features, in_features, block_size, permuted
SHAPES = [
    (1, 64, 64, False),
    (6, 100, 128, True),
    (42, 192, 64, True),
    (42, 192, -1, False),
    (123, 576, 128, False),
    (9, 576, 256, True),
    (5, 4304, 128, True),
    (5, 4304, -1, False),
    (7, 1000, 64, False),
    (3, 3, 128, False),
]
LAYOUTS = {layout.name: layout for layout in all_layouts()}
ALL_KERNELS = ["portable", "avx2", "avx-vnni", "avx512-vnni", "avx512-bf16", "amx", "neon", "dotprod"]
needs_native = pytest.mark.skipif(native.load() is None, reason="the native extension was not built")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "torch"])
def kernels(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    return request.param


def check(packed, m: int, dtype: torch.dtype = torch.float32, kernel: str | None = None) -> None:
    """Within the rounding of float32 sums of these many terms, or of two digits of x, and of the result to `dtype`."""
    x = torch.randn(m, packed.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(packed.out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference.linear(x.double(), packed, bias.double())
    size = x.double().abs() @ packed.unpack().dequantize(torch.float64).abs().T + bias.double().abs()
    result = cpu.linear(x, packed, bias) if kernel is None else native.linear(x, packed, bias, kernel)
    assert result.dtype == dtype
    if dtype == torch.float32:
        allowed = 1.5e-6 * size
    else:
        allowed = 5e-5 * size + torch.finfo(dtype).eps * expected.abs()
    assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("rows", "columns", "block_size", "permuted"), SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_shape(name, rows, columns, block_size, permuted, kernels, poisoned):
    packed = random_packed(LAYOUTS[name], rows, columns, block_size, permuted=permuted)
    for m in (1, 2, 7, 11):
        check(packed, m)


@pytest.mark.parametrize("name", LAYOUTS)
def test_input_grad(name, kernels, poisoned):
    packed = random_packed(LAYOUTS[name], 431, 200, permuted=True)
    grad = torch.randn(3, 431, generator=torch.Generator().manual_seed(2))
    assert relative_error(cpu.input_grad(grad, packed), reference.input_grad(grad.double(), packed)) < 2e-6


@contextmanager
def defaults(dtype: torch.dtype, device: str):
    """Other defaults of torch than its own, as a program may set them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("choice", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")], ids=str)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-col"])
def test_results_do_not_depend_on_defaults_of_torch(name, choice, kernels):
    packed = random_packed(LAYOUTS[name], 70, 300, permuted=True)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(m, 300).to(dtype) for m in (1, 4, 200)]
        grad = torch.randn(3, 70).to(dtype)
        expected = [*(cpu.linear(x, packed, None) for x in inputs), cpu.input_grad(grad, packed)]
        lookup._byte_signs.cache_clear()
        with defaults(*choice):
            found = [*(cpu.linear(x, packed, None) for x in inputs), cpu.input_grad(grad, packed)]
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("m", range(1, 14))
def test_every_number_of_rows(m, kernels, poisoned):
    check(random_packed(planes_layout(2, col_scale=True), 33, 300), m)


@pytest.mark.parametrize("name", ["planes-1-col", "groups-all-salient-col"])
def test_chunks_of_rows(name, kernels, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_FLOATS", 1500)
    packed = random_packed(LAYOUTS[name], 123, 300, permuted=True)
    for m in (2, 20):
        check(packed, m)
    grad = torch.randn(3, 123)
    assert relative_error(cpu.input_grad(grad, packed), reference.input_grad(grad.double(), packed)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8])
def test_half_precision_input_is_rounded_once_at_the_end(m, dtype, kernels):
    check(random_packed(planes_layout(1, col_scale=True), 64, 576), m, dtype)


@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-col", "groups-non-salient-salient-mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [20, 600])
def test_long_half_precision_input(m, dtype, name, kernels):
    """The weight may be rounded to x's dtype too: the error of a dense layer in that dtype."""
    packed = random_packed(LAYOUTS[name], 70, 576, permuted=True)
    x, bias = torch.randn(m, 576).to(dtype), torch.randn(70).to(dtype)
    result = cpu.linear(x, packed, bias)
    assert result.dtype == dtype
    expected = reference.linear(x.double(), packed, bias.double())
    assert (result.double() - expected).norm() < (4e-3 if dtype == torch.bfloat16 else 5e-4) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scales_of_any_dtype(dtype, kernels):
    packed = random_packed(bitmap_layout("all", True, True), 20, 300)
    scales = ("row_scale", "col_scale", "salient_col_scale")
    packed = type(packed)(**{k: v.to(dtype) if k in scales else v for k, v in vars(packed).items()})
    for m in (2, 20):
        check(packed, m)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_tensors_and_input_are_only_read(name, kernels):
    """float32 tensors above all, of which `.float()` is no copy."""
    packed = random_packed(LAYOUTS[name], 20, 300, permuted=True)
    tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    packed = type(packed)(**{**vars(packed), **tensors})
    x, bias, grad = torch.randn(20, 300), torch.randn(20), torch.randn(3, 20)
    tensors |= {"x": x, "bias": bias, "grad": grad}
    before = {k: v.clone() for k, v in tensors.items()}
    cpu.linear(x[:2], packed, bias)
    cpu.linear(x, packed, bias)
    cpu.input_grad(grad, packed)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, before[key])


@needs_native
def test_half_scales_are_read_exactly():
    """Subnormal, largest, zero, negative, infinite: bit for bit what torch makes of them."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[~values.isnan()][:, None]
    layout = planes_layout(1)
    packed = random_packed(layout, len(values), 1)
    packed = type(packed)(**{**vars(packed), "row_scale": values, "weight": torch.ones_like(packed.weight)})
    plan, tiles = plan_for(layout.name), tiles_for(1, 128, native.LANES)
    columns = prepare_columns(torch.ones(1, 1), packed, plan, tiles)
    weight = native.dequantize(columns, packed, tiles, torch.empty(len(values), 128))
    assert torch.equal(weight[:, :1], values.float())


@needs_native
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize(("columns", "block_size"), [(100, 128), (192, 64), (1096, 256), (430, -1), (200, 64)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kernel(name, columns, block_size, kernel, poisoned):
    if kernel not in native.kernels():
        pytest.skip("this machine does not have it")
    packed = random_packed(LAYOUTS[name], 41, columns, block_size, permuted=True)
    for m in (1, 7, 37):
        check(packed, m, kernel=kernel)
    check(packed, 5, torch.bfloat16, kernel)
    check(packed, 5, torch.float16, kernel)
    plan, tiles = plan_for(name), tiles_for(columns, block_size, native.LANES)
    ones = prepare_columns(torch.ones(1, columns), packed, plan, tiles)
    fallback = tiles_for(columns, block_size, tiles.width // 8)
    expected = lookup.dequantize(
        prepare_columns(torch.ones(1, columns), packed, plan, fallback), packed, plan, fallback
    )
    expected = fallback.join(expected.view(41, tiles.count, -1, 8).transpose(-1, -2))
    out = torch.empty(41, tiles.count, 8, native.LANES)
    weight = tiles.join(native.dequantize(ones, packed, tiles, out, kernel))
    assert relative_error(weight, expected) <= 1e-6


@needs_native
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(kernel, dtype):
    if kernel not in native.kernels():
        pytest.skip("this machine does not have it")
    packed = random_packed(bitmap_layout("all", True, True), 70, 600)
    x = torch.randn(150, 600).to(dtype)
    together = native.linear(x, packed, None, kernel)
    for m in (0, 1, 77, 149):
        assert torch.equal(native.linear(x[m : m + 1], packed, None, kernel)[0], together[m])


@needs_native
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize(("columns", "block_size"), [(600, 128), (200, 64), (1536, -1), (5, 128)])
@pytest.mark.parametrize("name", ["planes-1", "planes-2-col", "planes-2-mean"])
def test_rows_together_or_alone(name, columns, block_size, kernel, poisoned):
    """One token takes several rows at a time, four and more are taken in blocks, and rows that are left one by one."""
    if kernel not in native.kernels():
        pytest.skip("this machine does not have it")
    packed = random_packed(LAYOUTS[name], 43, columns, block_size)
    bias = torch.randn(43, generator=torch.Generator().manual_seed(1))
    x = torch.randn(38, columns, generator=torch.Generator().manual_seed(2))
    together = native.linear(x, packed, bias, kernel)
    for m in (0, 1, 2, 30, 31, 32, 37):
        assert torch.equal(native.linear(x[m : m + 1], packed, bias, kernel)[0], together[m])
    for count in (3, 4, 34):
        assert torch.equal(native.linear(x[:count], packed, bias, kernel), together[:count])
    for rows in (1, 7, 8, 9, 16):
        part = native.linear(x[:1], packed.rows(3, 3 + rows), bias[3 : 3 + rows], kernel)
        assert torch.equal(part[0], together[0, 3 : 3 + rows])


@needs_native
@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_columns_that_are_not_finite_or_tiny(kernel):
    """NaN in that row of the result alone; float32's smallest numbers count as zero beside others."""
    if kernel not in native.kernels():
        pytest.skip("this machine does not have it")
    packed = random_packed(planes_layout(2, col_scale=True), 9, 300)
    x = torch.randn(4, 300)
    expected = native.linear(x, packed, None, kernel)
    x[1, 200], x[2, 7] = float("inf"), float("nan")
    result = native.linear(x, packed, None, kernel)
    assert result[1:3].isnan().all()
    assert torch.equal(result[[0, 3]], expected[[0, 3]])
    assert not native.linear(torch.zeros(2, 300), packed, None, kernel).any()
    for scale in (1e-25, 1e25):
        check_scaled = native.linear(x[:1] * scale, packed, None, kernel) / scale
        assert relative_error(check_scaled, expected[:1]) < 2e-6


def test_choice_of_kernels():
    every = ["portable", "avx2", "avx-vnni", "avx512-vnni", "avx512-bf16", "amx"]
    assert choose_kernel(every, "planes-1-col", 1, torch.bfloat16) == "avx512-bf16"
    assert choose_kernel(every, "planes-1-col", 2, torch.bfloat16) == "amx"
    assert choose_kernel(every, "planes-2-col", 512, torch.bfloat16) is None
    assert choose_kernel(every, "planes-1-col", 512, torch.float32) == "amx"
    for kernels in (every[:2], every[:4], every[:5]):
        assert choose_kernel(kernels, "planes-1-col", 16, torch.float32) == kernels[-1]
        assert choose_kernel(kernels, "planes-2-col", 512, torch.float32) is None
    assert choose_kernel(every[:5], "planes-1-col", 512, torch.float32) == "avx512-bf16"
    assert choose_kernel(every[:5], "planes-1-col", 512, torch.bfloat16) is None
    # of a product of two planes every term sums its own digits, and no rows meet several tokens
    assert choose_kernel(every[:4], "planes-3-col", 9, torch.float32) == "avx512-vnni"
    assert choose_kernel(every[:4], "groups-all-salient-col", 9, torch.float32) is None
    assert choose_kernel(["portable"], "groups-all-salient-col", 1, torch.float16) == "portable"


@needs_native
def test_threads_do_not_change_the_result():
    packed = random_packed(planes_layout(2, col_scale=True), 600, 2000)
    before = torch.get_num_threads()
    try:
        for kernel in native.kernels():
            for m in (1, 6):
                x = torch.randn(m, 2000)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(native.linear(x, packed, None, kernel))
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("columns", "block_size"), [(1, 128), (64, 64), (70, 64), (128, 128), (300, 128), (4304, -1)])
def test_tiles_put_each_column_where_its_bit_is(columns, block_size):
    tiles = Tiles(columns, block_size, 16)
    x = torch.arange(1.0, columns + 1)
    assert torch.equal(tiles.join(tiles.split(x)), x)
    for column in (0, columns // 2, columns - 1):
        bits = torch.zeros(1, 1, columns, dtype=torch.bool)
        bits[..., column] = True
        packed = pack_bits(bits, tiles.width)[0]
        byte = int(packed.nonzero())
        bit = int(packed[byte]).bit_length() - 1
        whole = tiles.width // 8
        assert tiles.split(x)[byte // whole, bit, byte % whole] == column + 1


def test_missing_extension_warns_once_and_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"was not built.*C compiler.*pip install"):
            assert native.load() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(random_packed(planes_layout(1), 6, 100), 1)
    finally:
        monkeypatch.undo()
        native.load.cache_clear()


def test_broken_extension_falls_back_with_a_warning(monkeypatch, tmp_path):
    (tmp_path / ("_native" + importlib.machinery.EXTENSION_SUFFIXES[0])).write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be loaded"):
            assert native.load() is None
    finally:
        monkeypatch.undo()
        native.load.cache_clear()


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_extension_is_not_linked_with_its_own_openmp():
    """A second pool of threads would spin against torch's."""
    library = native.load()._name
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libgomp" not in dynamic
    assert "libomp" not in dynamic
