"""The operator: reference backend, registration, gradients, shapes, errors."""

import pytest
import torch
from packed_weights import random_binarized, random_packed, relative_error

from optimum_arb.format.layout import all_layouts, bitmap_layout, planes_layout
from optimum_arb.format.packing import TENSOR_NAMES, pack
from optimum_arb.ops import linear
from optimum_arb.ops.backends import reference
from optimum_arb.ops.backends.cpu import native

LAYOUTS = {layout.name: layout for layout in all_layouts()}


def arguments(packed, bias=None, backend="auto") -> tuple:
    tensors = [getattr(packed, name) for name in TENSOR_NAMES]
    return (*tensors, bias, packed.layout.name, packed.block_size, backend)


def run(x, packed, bias=None, backend="auto"):
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    return linear(x, **tensors, bias=bias, layout=packed.layout.name, block_size=packed.block_size, backend=backend)


def test_reference_by_hand():
    """Two rows, three columns, one plane: signs times row scale times column scale."""
    packed = random_packed(planes_layout(1, col_scale=True), 2, 3)
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    binarized = random_binarized(planes_layout(1, col_scale=True), 2, 3)
    binarized.signs = (signs > 0)[None]
    binarized.row_scale = torch.tensor([[[2.0]], [[0.5]]])
    binarized.col_scale = torch.tensor([[1.0, 3.0, -4.0]])
    packed = type(packed)(packed.layout, 128, 3, **pack(binarized))
    x = torch.tensor([1.0, 10.0, 100.0])
    expected = torch.tensor([2 * (1 - 30 - 400.0) + 7, 0.5 * (-1 - 30 - 400.0)])
    for backend in ("reference", "cpu", "auto"):
        assert torch.equal(run(x, packed, torch.tensor([7.0, 0.0]), backend), expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_the_dequantized_weight(name):
    packed = random_packed(LAYOUTS[name], 6, 300, permuted=True)
    weight = packed.unpack().dequantize(torch.float64)
    x = torch.randn(4, 300, dtype=torch.float64)
    assert torch.equal(run(x, packed, backend="reference"), x @ weight.T)
    assert relative_error(run(x.float(), packed, backend="reference"), x @ weight.T) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64_computes_in_float64(backend):
    packed = random_packed(planes_layout(2, col_scale=True), 6, 300)
    x = torch.randn(4, 300, dtype=torch.float64)
    result = run(x, packed, backend=backend)
    assert result.dtype == torch.float64
    assert relative_error(result, x @ packed.unpack().dequantize(torch.float64).T) < 1e-14


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(300,), (1, 300), (2, 3, 300), (2, 1, 7, 300), (0, 300), (2, 0, 300)])
def test_batch_shapes(shape, backend):
    packed = random_packed(planes_layout(1, col_scale=True), 6, 300)
    x = torch.randn(shape)
    result = run(x, packed, torch.randn(6), backend)
    assert result.shape == (*shape[:-1], 6)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_no_columns(tokens, backend):
    """As of `nn.Linear(0, N)`: a kernel divided by their number."""
    tensors = torch.zeros(5, 0, dtype=torch.uint8), torch.zeros(5, 0).half()
    bias = torch.randn(5)
    x = torch.randn(tokens, 0, requires_grad=True)
    out = linear(x, *tensors, bias=bias, layout="planes-1", block_size=128, backend=backend)
    assert torch.equal(out, bias.expand(tokens, 5))
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-col"])
def test_autocast_changes_nothing(name, backend):
    """Dense products inside were rounded by it, those of the bits were not: the number of rows decided."""
    packed, bias = random_packed(LAYOUTS[name], 42, 300), torch.randn(42)
    for rows in (1, 64):
        x, results = torch.randn(rows, 300, requires_grad=True), []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = run(x, packed, bias, backend)
                results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
        assert all(torch.equal(off, on) for off, on in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_strided_input(backend):
    """The native kernels sum in one order; a library takes another way through a transposed matrix, and its sums round
    otherwise on some processors (with AVX2 alone)."""
    packed = random_packed(planes_layout(1, col_scale=True), 6, 300)
    turned, skipping = torch.randn(300, 20).T, torch.randn(3, 600)[:, ::2]
    repeated = torch.randn(1, 300).expand(12, 300)
    assert not turned.is_contiguous()
    for x in (turned, skipping, repeated):
        found, expected = run(x, packed, backend=backend), run(x.contiguous(), packed, backend=backend)
        assert relative_error(found, expected) < 2e-6
        if backend == "cpu" and native.load() is not None:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "name", ["planes-1-col", "planes-3-mean", "groups-non-salient-salient-mean", "groups-all-salient-col"]
)
def test_gradients(name, backend):
    packed = random_packed(LAYOUTS[name], 17, 200, permuted=True)
    weight = packed.unpack().dequantize(torch.float64)
    x = torch.randn(2, 5, 200, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(17, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 17, dtype=torch.float64)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), upstream)
    result = torch.autograd.grad(run(x, packed, bias, backend), (x, bias), upstream)
    for value, wanted in zip(result, expected, strict=True):
        assert relative_error(value, wanted) < 1e-12
    x32, bias32 = x.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    result = torch.autograd.grad(run(x32, packed, bias32, backend), (x32, bias32), upstream.float())
    for value, wanted in zip(result, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, wanted) < 2e-6


def test_gradcheck():
    packed = random_packed(planes_layout(2, col_scale=True), 5, 12)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: run(x, packed, bias), (x, bias))


def test_gradient_of_a_vector_and_of_one_input_alone():
    packed = random_packed(planes_layout(1), 5, 12)
    x, bias = torch.randn(12), torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(run(x, packed, bias).sum(), (bias,))
    assert torch.equal(grad, torch.ones(5))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(run(x, packed).sum(), (x,))
    assert relative_error(grad, packed.unpack().dequantize().sum(0)) < 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        planes_layout(1, col_scale=True),
        planes_layout(2, mean=True),
        bitmap_layout("non-salient", True, False),
        bitmap_layout("all", True, True),
    ],
    ids=lambda layout: layout.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layout, dtype):
    packed = random_packed(layout, 9, 200, permuted=True)
    for x in (torch.randn(3, 200, dtype=dtype), torch.randn(2, 7, 200, dtype=dtype, requires_grad=True)):
        torch.library.opcheck(
            torch.ops.optimum_arb.linear.default, (x, *arguments(packed, torch.randn(9, dtype=dtype)))
        )
    torch.library.opcheck(
        torch.ops.optimum_arb.linear_input_grad.default,
        (torch.randn(3, 9, dtype=dtype), *arguments(packed)[:7], layout.name, 128, 200, "auto"),
    )


def test_device_decides_the_backend_of_auto(monkeypatch):
    """On the meta device, which stands for any other than the CPU, only "cpu" is refused."""
    packed = random_packed(planes_layout(1), 5, 128)
    x = torch.randn(2, 128)
    assert torch.equal(run(x, packed), run(x, packed, backend="cpu"))
    meta = type(packed)(packed.layout, 128, 128, *(t if t is None else t.to("meta") for t in arguments(packed)[:7]))
    assert run(x.to("meta"), meta).shape == (2, 5)
    from optimum_arb.ops.linear import _backend

    monkeypatch.setitem(_backend.__wrapped__.__globals__, "has_kernels", lambda device: False)
    _backend.cache_clear()
    assert _backend("auto", torch.device("cuda")) is reference
    with pytest.raises(ValueError, match=r"backend='cpu' was given a tensor on cuda:0: use backend='auto'"):
        _backend("cpu", torch.device("cuda:0"))
    _backend.cache_clear()


def test_bad_arguments():
    packed = random_packed(planes_layout(1), 5, 128)
    with pytest.raises(ValueError, match=r"input has 256 features.*needs torch.uint8 \[out_features, 32\]"):
        run(torch.randn(2, 256), packed)
    with pytest.raises(ValueError, match=r"torch.int64 \[2, 128\]: it must be floating"):
        run(torch.ones(2, 128, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        run(torch.randn(2, 128), packed, backend="fast")
    with pytest.raises(ValueError, match="Unknown layout"):
        torch.ops.optimum_arb.linear(torch.randn(2, 128), *arguments(packed)[:8], "planes-9", 128, "auto")
