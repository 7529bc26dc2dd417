import pytest
import torch
from packed_weights import random_binarized
from safetensors.torch import load_file, save_file

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.format.packing import (
    BinarizedWeight,
    bits_per_weight,
    check_block_size,
    pack,
    pack_bits,
    packed_bytes,
    packed_shapes,
    stored_bytes,
    unpack,
    unpack_bits,
)

SHAPES = [(6, 576, 128), (1, 192, 64), (43, 320, 256), (5, 100, -1), (3, 7, 128), (2, 1, 128), (2, 4304, 128)]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 63, 64, 100, 128, 129, 192, 576])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_bits_round_trip(columns, tile, planes):
    bits = torch.rand(planes, 5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    packed = pack_bits(bits, tile)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, planes * packed_bytes(columns, tile))
    assert torch.equal(unpack_bits(packed, planes, columns, tile), bits)


def test_place_of_every_bit():
    """Byte i, bit j of a tile of b bytes is column j * b + i; the planes of a tile lie side by side."""
    for plane, column, byte, bit in [
        (0, 0, 0, 0),
        (0, 1, 1, 0),
        (0, 16, 0, 1),
        (0, 127, 15, 7),
        (1, 0, 16, 0),
        (0, 128, 32, 0),  # the last tile has 72 columns, 9 bytes a plane
        (0, 136, 40, 0),
        (0, 137, 32, 1),
        (1, 199, 41 + 71 % 9, 71 // 9),
    ]:
        bits = torch.zeros(2, 1, 200, dtype=torch.bool)
        bits[plane, 0, column] = True
        packed = pack_bits(bits)[0]
        assert packed.nonzero().flatten().tolist() == [byte]
        assert packed[byte] == 1 << bit


@pytest.mark.parametrize("layout", all_layouts(), ids=lambda layout: layout.name)
@pytest.mark.parametrize(("rows", "columns", "block_size"), SHAPES)
def test_round_trip(layout, rows, columns, block_size):
    weight = random_binarized(layout, rows, columns, block_size, permuted=True)
    salient = 0 if weight.salient_columns is None else len(weight.salient_columns)
    packed = pack(weight)
    shapes = packed_shapes(layout, rows, columns, block_size, permuted=True, salient=salient)
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == shapes
    loaded = unpack(packed, layout, columns, block_size)
    torch.testing.assert_close(loaded.dequantize(), weight.dequantize(), rtol=0, atol=2e-2)
    # the rounding to float16 is all that was lost
    again = pack(loaded)
    assert all(torch.equal(again[name], packed[name]) for name in packed)


@pytest.mark.parametrize("layout", all_layouts(), ids=lambda layout: layout.name)
def test_bits_per_weight_are_the_bytes_in_the_file(layout, tmp_path):
    packed = pack(random_binarized(layout, 24, 320, permuted=True))
    save_file(packed, tmp_path / "weight.safetensors")
    size = (tmp_path / "weight.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "weight.safetensors").read_bytes()[:8], "little") + 8
    assert stored_bytes(packed) == size - header
    assert bits_per_weight(packed, 24, 320) == (size - header) * 8 / (24 * 320)
    loaded = load_file(tmp_path / "weight.safetensors")
    assert all(torch.equal(loaded[name], packed[name]) for name in packed)


@pytest.mark.parametrize(
    ("planes", "bits"),
    [(1, 1 + 16 / 128 + 16 / 4096), (2, 2 * (1 + 16 / 128 + 16 / 4096)), (3, 3 * (1 + 16 / 128 + 16 / 4096))],
)
def test_true_bits_at_4096(planes, bits):
    shapes = packed_shapes(planes_layout(planes, col_scale=True), 4096, 4096, 128, permuted=False)
    stored = sum(r * c * (8 if name == "weight" else 16) for name, (r, c) in shapes.items())
    assert stored / 4096**2 == bits


def test_scales_that_float16_cannot_hold_are_stored_in_float32():
    layout = planes_layout(1)
    for scale, dtype in ((1.0, torch.float16), (1e5, torch.float32), (1e-6, torch.float32), (0.0, torch.float16)):
        weight = BinarizedWeight(layout, -1, torch.ones(1, 2, 8, dtype=torch.bool), torch.full((2, 1, 1), scale))
        packed = pack(weight)
        assert packed["row_scale"].dtype == dtype
        torch.testing.assert_close(unpack(packed, layout, 8, -1).dequantize(), weight.dequantize(), rtol=1e-3, atol=0)


def test_wide_weights_have_wide_indices():
    layout = planes_layout(1)
    for columns, dtype in ((2**15, torch.int16), (2**15 + 1, torch.int32)):
        weight = BinarizedWeight(
            layout,
            -1,
            torch.ones(1, 1, columns, dtype=torch.bool),
            torch.ones(1, 1, 1),
            permutation=torch.arange(columns).flip(0),
        )
        packed = pack(weight)
        assert packed["permutation"].dtype == dtype
        assert torch.equal(unpack(packed, layout, columns, -1).permutation, weight.permutation)


def test_permutation_says_where_a_column_comes_from():
    signs = torch.tensor([[[True, False, False, False]]])
    weight = BinarizedWeight(planes_layout(1), -1, signs, torch.ones(1, 1, 1), permutation=torch.tensor([2, 0, 1, 3]))
    assert weight.dequantize().tolist() == [[-1.0, -1.0, 1.0, -1.0]]


@pytest.mark.parametrize("block_size", [0, 1, 32, 65, 100, 192, -2])
def test_block_sizes_that_cannot_be_packed(block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size} cannot be packed: use 64"):
        check_block_size(block_size)
