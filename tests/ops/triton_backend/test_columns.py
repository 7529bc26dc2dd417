"""The input as the stored columns meet it, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton.columns import Gather, gather_columns
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, columns_read, scales_input, split_of

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(
    ("planes", "columns", "scaled"),
    [(1, 300, False), (1, 300, True), (2, 300, False), (1, 640, True), (2, 128, True), (2, 640, True), (3, 768, True)],
)
@pytest.mark.parametrize("permuted", [False, True])
def test_gather(permuted, planes, columns, scaled, tokens):
    packed = random_packed(planes_layout(planes, col_scale=True), 6, columns, permuted=permuted)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).half()  # to bfloat16 the interpreter cuts
    expected = x[:, packed.permutation[0].long()] if permuted else x
    if scaled:
        copies = [(expected.float() * scale.float()).half() for scale in packed.col_scale]
        tiles = [each for tile in zip(*(copy.split(128, 1) for copy in copies), strict=True) for each in tile]
        expected = torch.cat(tiles, 1)
    wide = torch.cat([x, x], 1)[:, :columns]  # rows of another stride
    for source in (x, wide, x.T.contiguous().T):
        assert torch.equal(gather_columns(source, packed, scaled=scaled), expected)


@pytest.mark.parametrize(
    ("planes", "col_scale", "permuted", "asked", "scales"),
    [
        (1, True, False, False, False),
        (1, True, False, True, True),
        (1, True, True, False, True),
        (1, False, True, True, False),
        (2, True, True, False, False),
        (2, True, True, True, True),
        (2, True, False, True, True),
        (2, False, False, True, False),
        (3, True, False, True, True),
    ],
)
def test_which_input_is_scaled(planes, col_scale, permuted, asked, scales):
    packed = random_packed(planes_layout(planes, col_scale=col_scale), 6, 384, permuted=permuted)
    config = GemmConfig("hopper", split_k=16, scale_input=asked)
    assert scales_input(packed, config) == scales
    assert columns_read(packed, config) == (384 * planes if scales else 384)
    assert split_of(config, packed) == (3 * planes if scales else 3)


def test_column_scales_that_lie_apart_stay_with_the_weight():
    packed = random_packed(planes_layout(2, col_scale=True), 6, 256)
    apart = replace(packed, col_scale=packed.col_scale.T.contiguous().T)
    assert not scales_input(apart, GemmConfig("hopper", scale_input=True))


@pytest.mark.parametrize("block_size", [128, 256, -1])
@pytest.mark.parametrize("planes", [2, 3])
def test_planes_side_by_side_are_one_plane_of_more_columns(planes, block_size):
    """What `hopper_kernels.py` makes of scaled x: the bytes and the row scales of tile t and plane p are those of the
    (t * planes + p)-th tile of a weight of one plane."""
    packed = random_packed(planes_layout(planes, col_scale=True), 6, 768, block_size, permuted=True)
    x = torch.randn(5, 768).half()
    scaled = gather_columns(x, packed, scaled=True)
    one = random_packed(planes_layout(1), 6, planes * 768)
    tiles_per_block = 6 if block_size == -1 else block_size // 128
    tile = torch.arange(6 * planes)
    one.weight = packed.weight
    one.row_scale = packed.row_scale[:, tile // planes // tiles_per_block * planes + tile % planes]
    found = scaled.double() @ one.unpack().dequantize(torch.float64).T
    expected = x.double() @ packed.unpack().dequantize(torch.float64).T
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_more_tokens_than_a_grid_has_places():
    """Of the programs along the tokens, which are 65535 at most."""
    packed = random_packed(planes_layout(1, col_scale=True), 6, 256)
    for tokens in (70, 600_000, 2**22):
        gather = Gather([packed], [True], tokens, 256, (torch.float16, True), torch.device("cpu"))
        grid = gather.launch._grid
        assert grid[1] <= 65535
        assert grid[1] * gather.constants[-2] >= tokens
