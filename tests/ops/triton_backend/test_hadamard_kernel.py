"""The kernel of the block Hadamard transform, in Triton's interpreter."""

import pytest
import torch
from packed_weights import relative_error

from optimum_arb.format.hadamard import hadamard_transform, random_signs
from optimum_arb.ops.backends.triton.hadamard import transform


def expected(x, sign, order, block):
    x = x.double() if order is None else x.double()[..., order[0].long()]
    return hadamard_transform(x if sign is None else x * sign, block)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", [1, 17, 70])
@pytest.mark.parametrize(
    ("columns", "block"),
    [(128, 128), (576, 128), (300, 128), (11, 128), (512, 256), (576, 256), (395, 256), (100, 256), (203, 64)],
)
def test_shapes(columns, block, tokens):
    x = torch.randn(tokens, columns)
    sign = random_signs(columns, 1).to(torch.int8) * 2 - 1
    order = torch.randperm(columns).to(torch.int16)[None]
    assert relative_error(transform(x, order, sign, block), expected(x, order=order, sign=sign, block=block)) < 2e-6
    assert relative_error(transform(x, None, sign, block), expected(x, sign, None, block)) < 2e-6
    assert relative_error(transform(x, None, None, block), expected(x, None, None, block)) < 2e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("order_dtype", [torch.int16, torch.int32])
def test_dtypes_and_strides(dtype, tolerance, order_dtype):
    x = torch.randn(2, 3, 2 * 576).to(dtype)[..., :576]
    sign = random_signs(576, 1).to(torch.int8) * 2 - 1
    order = torch.randperm(576).to(order_dtype)[None]
    result = transform(x, order, sign, 128)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    assert result.is_contiguous()
    assert relative_error(result, expected(x, sign, order, 128)) < tolerance
    turned = torch.randn(576, 5).to(dtype).T
    assert relative_error(transform(turned, order, sign, 128), expected(turned, sign, order, 128)) < tolerance


def test_every_row_alike():
    x = torch.randn(40, 300).half()
    sign = random_signs(300, 1).to(torch.int8) * 2 - 1
    every = transform(x, None, sign, 128, batch_invariant=True)
    one_by_one = [transform(row[None], None, sign, 128, batch_invariant=True) for row in x[:3]]
    assert torch.equal(torch.cat(one_by_one), every[:3])
