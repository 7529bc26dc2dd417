"""The dequantizing kernel, in Triton's interpreter, against the unpacked weight in float64."""

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.triton.dequantize import dequantize

LAYOUTS = {layout.name: layout for layout in all_layouts()}
# out_features, in_features, block_size, permuted
SHAPES = [
    (1, 64, 64, False),
    (6, 100, 128, True),
    (42, 192, 64, True),
    (123, 576, 128, False),
    (9, 576, 256, True),
    (3, 4304, -1, True),
    (3, 1000, 64, False),
    (3, 3, 128, False),
]


def check(packed, dtype=torch.float32, **choices):
    """Within the rounding of the sums in float32 and of the result to `dtype`."""
    weight = packed.unpack()
    expected = weight.dequantize(torch.float64)
    size = expected.abs() + 1e-6 * expected.abs().max()
    if choices.get("transposed"):
        expected, size = expected.T, size.T
    result = dequantize(packed, dtype, **choices)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert result.shape == expected.shape
    # a value that rounds differently in float32 can round to the next number of `dtype`
    assert ((result.double() - expected).abs() <= (torch.finfo(dtype).eps + 2e-6) * size + 1e-6).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    check(random_packed(LAYOUTS[name], 6, 300, permuted=True))
    check(random_packed(LAYOUTS[name], 6, 300, block_size=64, permuted=True, salient=70), transposed=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "columns", "block_size", "permuted"), SHAPES)
@pytest.mark.parametrize("name", ["planes-2-col", "planes-3-mean", "groups-all-salient-col"])
def test_shapes(name, rows, columns, block_size, permuted):
    packed = random_packed(LAYOUTS[name], rows, columns, block_size, permuted=permuted)
    check(packed)
    check(packed, transposed=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    packed = random_packed(planes_layout(2, col_scale=True), 42, 192, permuted=True)
    check(packed, dtype)
    check(packed, dtype, transposed=True)


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 127, 128, 129, 191, 192])
def test_salient_counts(count):
    """The search for salient columns and the narrow last tile of their planes."""
    check(random_packed(LAYOUTS["groups-none-salient-col"], 5, 192, salient=count))


def test_stored_order():
    packed = random_packed(planes_layout(1), 5, 192, permuted=True)
    natural, stored = (dequantize(packed, torch.float32, stored_order=order) for order in (False, True))
    assert torch.equal(natural[:, packed.permutation[0].long()], stored)
