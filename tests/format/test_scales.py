"""Scales in 8 bits."""

import math

import pytest
import torch
from packed_weights import random_binarized, random_factorized, relative_error

from optimum_arb.format.factors import pack_factors, unpack_factors
from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.format.packing import pack, packed_shapes, stored_bytes, unpack
from optimum_arb.format.scales import Rounding, decode_scales, encode_scales, nearest_on_grid, round_scales

PLANES = [layout for layout in all_layouts() if layout.is_planes]
OTHERS = [layout for layout in all_layouts() if not layout.is_planes]


def test_values_of_a_grid():
    grid = torch.tensor([-3.0, 0.02])
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode_scales(codes, grid)
    assert values.dtype == torch.float16
    expected = [0.0] + [2.0 ** (-3.0 + float(grid[1]) * (code - 1)) for code in range(1, 256)]
    assert torch.equal(values, torch.tensor(expected, dtype=torch.float64).half())


@pytest.mark.parametrize("octaves", [0.0, 0.1, 1.0, 3.0])
def test_relative_error(octaves):
    """At most half a step, and float16's own rounding."""
    scale = 0.01 * 2 ** (torch.rand(5000, generator=torch.Generator().manual_seed(0)) * octaves)
    codes, grid = encode_scales(scale)
    assert codes.min() >= 1
    assert float(grid[1]) <= (octaves + 1e-3) / 254
    error = (decode_scales(codes, grid).double() / scale.double()).log2().abs().max()
    assert error <= float(grid[1]) / 2 + 2**-10
    assert 2**error - 1 < 0.0055


def test_zero_is_exact_and_outliers_do_not_widen_the_grid():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1000, generator=generator) + 0.5
    narrow = (round_scales(scale) - scale).square().sum()
    scale[:4] = torch.tensor([0.0, 1e-7, 1e-4, 0.2])
    rounded = round_scales(scale)
    assert rounded[0] == 0
    assert rounded[1] == 0
    assert (rounded[4:] - scale[4:]).square().sum() < 12 * narrow
    assert not round_scales(torch.zeros(3)).any()


@pytest.mark.parametrize("seed", range(20))
def test_rounding_again_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    spread = float(torch.rand(1, generator=generator)) * 6
    scale = torch.randn(300, generator=generator).abs() * 2 ** (torch.randn(300, generator=generator) * spread - 4)
    once = round_scales(scale)
    assert torch.equal(round_scales(once), once)
    assert torch.equal(round_scales(once * 2**-3), once * 2**-3)


@pytest.mark.parametrize("step", [1e-4, 1.1e-3, 0.0011117, 0.003, 0.04])
@pytest.mark.parametrize("low", [-0.2, -0.12502, -5.15294, -12.0])
def test_a_value_of_a_grid_is_nearest_to_itself(low, step):
    """Below a power of two float16 is twice as fine as above: there the code that is nearest by its logarithm may stand
    for another value than the one that is rounded."""
    grid = torch.tensor([[low, step]])
    values = decode_scales(torch.arange(256, dtype=torch.uint8), grid[0]).float()[:, None]
    between = (values * torch.linspace(0.999, 1.001, 801)).flatten()[:, None]
    for rounded in (lambda scale: nearest_on_grid(scale, grid), Rounding(grid)):
        assert torch.equal(rounded(values), values)
        found = rounded(between)
        assert torch.equal(rounded(found), found)


@pytest.mark.parametrize("seed", range(8))
def test_packing_what_was_unpacked_changes_nothing(seed):
    """Scales that hardly differ, as column scales after a Hadamard transform: the largest may get a code before the
    last, and then other grids come of what was rounded."""
    generator = torch.Generator().manual_seed(seed)
    weight = random_binarized(planes_layout(1, col_scale=True), 200, 300, 64, permuted=False)
    for name in ("row_scale", "col_scale"):
        scale = 2.0 ** (torch.rand(getattr(weight, name).shape, generator=generator) * 0.25 - 0.12)
        setattr(weight, name, scale)
    packed = pack(weight, 8)
    found = unpack(packed, weight.layout, 300, 64)
    again = unpack(pack(found, 8), weight.layout, 300, 64)
    assert torch.equal(again.row_scale, found.row_scale)
    assert torch.equal(again.col_scale, found.col_scale)


@pytest.mark.parametrize("scale", [[1e5, 1.0], [1e-6, 2e-6]])
def test_what_float16_does_not_hold(scale):
    assert encode_scales(torch.tensor(scale)) is None
    assert torch.equal(round_scales(torch.tensor(scale)), torch.tensor(scale))


# Packed weights


@pytest.mark.parametrize("block_size", [64, 128, -1])
@pytest.mark.parametrize("layout", PLANES, ids=lambda layout: layout.name)
def test_planes(layout, block_size):
    weight = random_binarized(layout, 20, 300, block_size, permuted=True)
    weight.row_scale[3] = 0
    positive = weight.with_positive_scales()
    assert torch.equal(positive.dequantize(), weight.dequantize())
    assert (positive.row_scale >= 0).all()
    packed = pack(weight, 8)
    shapes = packed_shapes(layout, 20, 300, block_size, True, scale_bits=8)
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == shapes
    assert packed["row_scale"].dtype == torch.uint8
    assert packed["scale_grid"].shape == (layout.row_scales + layout.col_scales, 2)
    found = unpack(packed, layout, 300, block_size)
    assert found.row_scale.dtype == torch.float16
    for plane in range(layout.planes):  # every plane has a grid of its own
        assert torch.equal(found.row_scale[..., plane].float(), round_scales(positive.row_scale[..., plane]))
        if layout.col_scales:
            assert found.col_scale.dtype == torch.float16
            assert torch.equal(found.col_scale[plane].float(), round_scales(positive.col_scale[plane]))
    assert relative_error(found.dequantize(), weight.dequantize()) < 0.05
    assert not found.dequantize()[3].any()
    again = pack(found, 8)
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(42, 300, 24), (16, 129, 129)])
def test_factors(rows, columns, rank):
    weight = random_factorized(rows, columns, rank)
    packed = pack_factors(weight, 8)
    found, balanced = unpack_factors(packed, columns), weight.balanced()
    for name in ("row_scale", "rank_scale", "col_scale"):
        assert torch.equal(getattr(found, name).float(), round_scales(getattr(balanced, name)))
    assert relative_error(found.dequantize(), weight.dequantize()) < 0.03
    again = pack_factors(found, 8)
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())
    saved = stored_bytes(pack_factors(weight)) - stored_bytes(packed)
    assert saved == rows + columns + rank - 3 * 2 * 4


def test_scales_that_float16_does_not_hold_stay_in_float32():
    weight = random_binarized(planes_layout(2, col_scale=True), 6, 128)
    weight.row_scale *= 1e-6
    packed = pack(weight, 8)
    assert packed["row_scale"].dtype == torch.float32
    assert not packed["scale_grid"][:2].any()
    assert packed["col_scale"].dtype == torch.uint8
    found = unpack(packed, weight.layout, 128, 128)
    assert torch.equal(found.row_scale, weight.row_scale.abs())
    assert relative_error(found.dequantize(), weight.dequantize()) < 0.05


@pytest.mark.parametrize("layout", OTHERS, ids=lambda layout: layout.name)
def test_other_layouts_are_refused(layout):
    with pytest.raises(ValueError, match="scale_bits=8 cannot be packed with the layout"):
        pack(random_binarized(layout, 6, 128), 8)


def test_one_plane_of_4096_costs_little():
    """1 + 8 / 128 bits of row scales, 8 / 4096 of column scales, and a grid of 16 bytes."""
    shapes = packed_shapes(planes_layout(1, col_scale=True), 4096, 4096, 128, False, scale_bits=8)
    sizes = {"weight": 1, "row_scale": 1, "col_scale": 1, "scale_grid": 4}
    bits = 8 * sum(math.prod(shape) * sizes[name] for name, shape in shapes.items()) / 4096**2
    assert bits == pytest.approx(1 + 8 / 128 + 8 / 4096, abs=1e-4)


@pytest.mark.parametrize("grids", [1, 3])
def test_rounding_by_tables_is_rounding(grids):
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(40, 5, grids, generator=generator).exp() * 0.01
    found = [encode_scales(scale[..., index]) for index in range(grids)]
    grid = torch.stack([each[1] for each in found if each is not None])
    assert len(grid) == grids
    rounding = Rounding(grid)
    moved = scale * (1 + 0.1 * torch.randn(scale.shape, generator=generator))
    moved[0, 0] = 0.0
    moved[1, 0] = 1e-9
    moved[2] *= -1
    moved[3, 0] = 1e9
    assert torch.equal(rounding(moved), nearest_on_grid(moved, grid))
    assert torch.equal(rounding(rounding(moved)), rounding(moved))


def test_rounding_to_a_grid_of_one_value():
    grid = torch.tensor([[-3.0, 0.0]])
    assert Rounding(grid)(torch.tensor([[0.125], [7.0], [0.01], [-0.2]])).tolist() == [
        [0.125],
        [0.125],
        [0.0],
        [-0.125],
    ]
