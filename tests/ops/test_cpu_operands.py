"""What the native kernels are handed: whatever would have them read elsewhere is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import layout_from_name, planes_layout
from optimum_arb.ops.backends.cpu import operands


@pytest.fixture
def packed():
    return random_packed(planes_layout(2, col_scale=True), 40, 300)


def test_a_weight_of_its_own_sizes(packed):
    operands.check(packed, None)
    operands.check(packed, torch.zeros(40))


@pytest.mark.parametrize("name", ["row_scale", "col_scale"])
def test_too_few_elements(packed, name):
    short = replace(packed, **{name: getattr(packed, name)[:, :-1]})
    size = getattr(packed, name).numel()
    with pytest.raises(ValueError, match=rf"The {name} of a packed linear layer is \[.*it must have {size} elements"):
        operands.check(short, None)


def test_a_bias_of_another_length(packed):
    with pytest.raises(ValueError, match=r"The bias of a packed linear layer is \[39\]: it must have 40 elements"):
        operands.check(packed, torch.zeros(39))


def test_tensors_on_another_device(packed):
    with pytest.raises(ValueError, match="its weight is on meta: move both to one device"):
        operands.check(replace(packed, weight=packed.weight.to("meta")), None)
    with pytest.raises(ValueError, match="its bias is on meta"):
        operands.check(packed, torch.zeros(40, device="meta"))


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("permutation", torch.int64, "torch.int16 or torch.int32"),
        ("permutation", torch.uint8, "torch.int16 or torch.int32"),  # four bytes of each would be read
        ("salient_columns", torch.int64, "torch.int16 or torch.int32"),
        ("salient_weight", torch.int8, "torch.uint8"),
        ("row_scale", torch.int16, "a floating dtype"),
    ],
)
def test_dtypes_that_would_be_read_as_others(name, dtype, wanted):
    packed = random_packed(layout_from_name("groups-all-salient-col"), 40, 300, permuted=True)
    operands.check(packed, None)
    with pytest.raises(ValueError, match=f"The {name} of a packed linear layer is {dtype}: it must be {wanted}"):
        operands.check(replace(packed, **{name: getattr(packed, name).to(dtype)}), None)


def test_what_the_kernels_read_is_handed_on_as_it_is(packed):
    assert operands.ready(packed) is packed
    assert operands.ready_tensor(None) is None


def test_what_they_do_not_read_is_copied(packed):
    strided = packed.row_scale.repeat_interleave(2, 1)[:, ::2]
    wide = packed.col_scale.double()
    found = operands.ready(replace(packed, row_scale=strided, col_scale=wide))
    assert found.weight is packed.weight
    assert found.row_scale.is_contiguous()
    assert torch.equal(found.row_scale, packed.row_scale)
    assert found.col_scale.dtype == torch.float32
    assert found.col_scale.dtype in operands.TYPES
