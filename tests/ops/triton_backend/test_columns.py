"""The input as the stored columns meet it, in Triton's interpreter."""

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton.columns import gather_columns
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig
from optimum_arb.ops.backends.triton.hopper_product import scales_input

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_gather(permuted, scaled, multiple, tokens):
    packed = random_packed(planes_layout(1, col_scale=True), 6, 300, permuted=permuted)
    x = torch.randn(
        tokens, 300, generator=torch.Generator().manual_seed(tokens)
    ).half()  # to bfloat16 the interpreter cuts
    found = gather_columns(x, packed, scaled=scaled, multiple=multiple)
    expected = x[:, packed.permutation[0].long()] if permuted else x
    if scaled:
        expected = (expected.float() * packed.col_scale[0].float()).half()
    assert torch.equal(found[:, :300], expected)
    assert found.shape[1] == (384 if multiple == 128 else 300)
    assert not found[:, 300:].any()


@pytest.mark.parametrize(
    ("planes", "col_scale", "permuted", "asked", "scales"),
    [
        (1, True, False, False, False),
        (1, True, False, True, True),
        (1, True, True, False, True),
        (1, False, True, True, False),
        (2, True, True, True, False),
    ],
)
def test_which_input_is_scaled(planes, col_scale, permuted, asked, scales):
    packed = random_packed(planes_layout(planes, col_scale=col_scale), 6, 256, permuted=permuted)
    assert scales_input(packed, GemmConfig("hopper", scale_input=asked)) == scales
