"""`optimum_arb::hadamard` against the transform's definition."""

import pytest
import torch
from packed_weights import relative_error

from optimum_arb.format.hadamard import hadamard_transform, random_signs
from optimum_arb.ops import hadamard

SIZES = [(128, 128), (300, 128), (576, 256), (203, 64), (11, 128), (1, 256)]


def operands(columns: int, permuted: bool):
    sign = random_signs(columns, 1).to(torch.int8) * 2 - 1
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).to(torch.int16)[None]
    return sign, order if permuted else None


def expected(x, sign, order, block):
    x = x.double() if order is None else x.double()[..., order[0].long()]
    return hadamard_transform(x * sign, block)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("columns", "block"), SIZES)
def test_transform_and_inverse(columns, block, permuted):
    sign, order = operands(columns, permuted)
    for shape in ((columns,), (1, columns), (2, 3, columns), (0, columns)):
        x = torch.randn(shape)
        result = hadamard(x, sign, order, block=block)
        assert result.shape == x.shape
        assert result.is_contiguous()
        if x.numel():
            assert relative_error(result, expected(x, sign, order, block)) < 2e-6
            assert relative_error(hadamard(result, sign, order, block=block, inverse=True), x) < 2e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_dtypes(dtype, tolerance, backend):
    sign, order = operands(300, True)
    x = torch.randn(4, 300).to(dtype)
    result = hadamard(x, sign, order, block=128, backend=backend)
    assert result.dtype == dtype
    assert relative_error(result, expected(x, sign, order, 128)) < tolerance


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_gradient(permuted, inverse):
    sign, order = operands(75, permuted)
    x = torch.randn(3, 75, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, sign, order, block=64, inverse=inverse), x)
    # orthogonal: inner products stay as they are
    x = x.detach()
    assert float(hadamard(x, sign, order, block=64, inverse=inverse).norm() / x.norm()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted, dtype):
    sign, order = operands(75, permuted)
    for x in (torch.randn(3, 75), torch.randn(2, 1, 75), torch.randn(75)):
        for inverse in (False, True):
            x = x.to(dtype).requires_grad_()
            torch.library.opcheck(torch.ops.optimum_arb.hadamard.default, (x, order, sign, 64, inverse, "auto"))


def test_another_number_of_columns():
    sign, _ = operands(64, False)
    with pytest.raises(ValueError, match=r"is \[3, 65\]: it must be \[..., 64\]"):
        hadamard(torch.randn(3, 65), sign, block=64)
