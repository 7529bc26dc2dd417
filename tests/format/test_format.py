"""docs/format.md is enough to read a weight: a reader written from it alone, in numpy, agrees with the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_weights import random_binarized, random_factorized

from optimum_arb.format.factors import pack_factors, unpack_factors
from optimum_arb.format.layout import bitmap_layout, planes_layout
from optimum_arb.format.packing import block_count, pack, unpack


def read_signs(packed: np.ndarray, planes: int, columns: int, tile: int) -> np.ndarray:
    """ "Packed signs": -1 and +1, float64 [planes, N, columns]."""
    signs = np.empty((planes, len(packed), columns))
    offset = 0
    for start in range(0, columns, tile):
        width = min(tile, columns - start)
        count = -(-width // 8)
        for plane in range(planes):
            part = packed[:, offset : offset + count]
            offset += count
            for column in range(width):
                bit, byte = divmod(column, count)
                signs[plane, :, start + column] = 2.0 * ((part[:, byte] >> bit) & 1) - 1
    assert offset == packed.shape[1]
    return signs


class Reader:
    """ "From planes to weights" for one weight; S columns and their positions in the list of salient columns."""

    def __init__(self, tensors: dict[str, np.ndarray], columns: int, block_size: int, planes: int, row_scales: int):
        self.tile = 64 if block_size == 64 else 128
        self.signs = read_signs(tensors["weight"], planes, columns, self.tile)
        width = columns if block_size == -1 else block_size
        blocks = -(-columns // width)
        scales = tensors["row_scale"].astype(float).reshape(-1, blocks, row_scales)
        self.r = [scales[:, np.arange(columns) // width, i] for i in range(row_scales)]
        self.c = list(tensors["col_scale"].astype(float)) if "col_scale" in tensors else []
        self.salient = np.zeros(0, dtype=int)
        if "salient_columns" in tensors:
            self.salient = tensors["salient_columns"][0].astype(int)
        if "salient_weight" in tensors:
            packed = tensors["salient_weight"]
            self.z = np.zeros(self.signs.shape[1:])
            self.z[:, self.salient] = read_signs(packed, 1, len(self.salient), self.tile)[0]
        for own in tensors.get("salient_col_scale", []):
            spread = np.zeros(columns)
            spread[self.salient] = own
            self.c.append(spread)


def by_tables(read: Reader, bitmap: str, means: bool) -> tuple[np.ndarray, np.ndarray]:
    """The two tables of the bitmap methods: the weight as the rest and as the salient columns have it."""
    r, c, s = read.r, read.c, read.signs[0]
    salient = np.zeros_like(s)
    has = len(read.salient) > 0
    if bitmap == "none":
        if means:
            rest = r[0] * s + r[1]
            salient = r[2] * s + r[3] * read.z + r[4] if has else salient
        else:
            rest = r[0] * c[0] * s
            salient = r[1] * c[0] * s + r[2] * c[1] * read.z if has else salient
        return rest, salient
    g = read.signs[1]
    if means:
        rest = r[0] * s + r[1] * g + r[2] + r[3] * s * g
        if has:
            salient = r[4] * s + r[5] * g + r[6]
            if bitmap == "all":
                salient = salient + r[7] * s * g + r[8] * read.z + r[9] * s * g * read.z
        return rest, salient
    rest = r[0] * c[0] * (s + g) / 2 + r[1] * c[1] * (s - g) / 2
    if has and bitmap == "non-salient":
        salient = r[2] * c[0] * s + r[3] * c[1] * g
    elif has:
        sgz = s * g * read.z
        salient = r[2] * c[0] * (s + g) / 2 + r[3] * c[1] * (s - g) / 2
        salient = salient + r[4] * c[2] * (read.z + sgz) / 2 + r[5] * c[3] * (read.z - sgz) / 2
    return rest, salient


def check(layout, columns: int, block_size: int, weight_of, salient: int = 0, permuted: bool = False) -> None:
    packed = pack(random_binarized(layout, 5, columns, block_size, permuted, salient))
    expected = unpack(packed, layout, columns, block_size).dequantize(torch.float64).numpy()
    tensors = {name: tensor.numpy() for name, tensor in packed.items()}
    stored = weight_of(Reader(tensors, columns, block_size, layout.planes, layout.row_scales))
    weight = np.empty_like(stored)
    weight[:, tensors["permutation"][0] if permuted else np.arange(columns)] = stored
    np.testing.assert_allclose(weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("columns", "block_size"), [(300, 128), (192, 64), (77, -1), (600, 256), (128, 128)])
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("permuted", [False, True])
def test_planes(planes, columns, block_size, permuted):
    def columns_scaled(read: Reader) -> np.ndarray:
        return sum(read.r[i] * read.c[i] * read.signs[i] for i in range(planes))

    check(planes_layout(planes, col_scale=True), columns, block_size, columns_scaled, permuted=permuted)
    if planes == 1:
        check(planes_layout(1), columns, block_size, lambda read: read.r[0] * read.signs[0])


@pytest.mark.parametrize("bitmap", ["none", "non-salient", "all"])
@pytest.mark.parametrize("salient", [0, 13])
@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize(("columns", "block_size"), [(300, 128), (150, 64)])
def test_bitmaps(bitmap, salient, means, columns, block_size):
    def weight_of(read: Reader) -> np.ndarray:
        rest, own = by_tables(read, bitmap if salient or bitmap != "all" else "non-salient", means)
        rest[:, read.salient] = own[:, read.salient]
        return rest

    check(bitmap_layout(bitmap, salient > 0, not means), columns, block_size, weight_of, salient)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 300, 77), (9, 64, 128), (3, 129, 260), (4, 7, 1)])
def test_products_of_two_sign_matrices(rows, columns, rank):
    packed = pack_factors(random_factorized(rows, columns, rank))
    expected = unpack_factors(packed, columns).dequantize(torch.float64).numpy()
    tensors = {name: tensor.numpy() for name, tensor in packed.items()}
    assert len(tensors["inner"]) == rank
    outer = read_signs(tensors["weight"], 1, rank, 128)[0]
    inner = read_signs(tensors["inner"], 1, columns, 128)[0]
    a, m, b = (tensors[name].astype(float).ravel() for name in ("row_scale", "inner_row_scale", "inner_col_scale"))
    assert all((scale >= 0).all() for scale in (a, m, b))
    np.testing.assert_allclose(a[:, None] * (outer * m) @ inner * b, expected, rtol=1e-9, atol=1e-12)


def read_codes(tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    """ "Scales in 8 bits": the scales, each `[..., grids]` or `[grids, ...]` as the shape given says."""
    grid = iter(tensors["scale_grid"].astype(np.float64))
    found = []
    for name, axes in shapes.items():
        codes = np.moveaxis(tensors[name].reshape(axes), 0 if name == "col_scale" else -1, 0).astype(np.float64)
        values = []
        for one in codes:
            low, step = next(grid)
            values.append(np.where(one == 0, 0, 2.0 ** (low + step * (one - 1))).astype(np.float16).astype(float))
        found.append(np.stack(values))
    assert next(grid, None) is None
    return found


@pytest.mark.parametrize(("columns", "block_size"), [(300, 128), (77, -1)])
@pytest.mark.parametrize("planes", [1, 2])
def test_scales_in_8_bits(planes, columns, block_size):
    layout = planes_layout(planes, col_scale=True)
    weight = random_binarized(layout, 5, columns, block_size, False, 0)
    weight.row_scale[2] = 0
    packed = pack(weight, 8)
    expected = unpack(packed, layout, columns, block_size).dequantize(torch.float64).numpy()
    tensors = {name: tensor.numpy() for name, tensor in packed.items()}
    assert tensors["row_scale"].dtype == tensors["col_scale"].dtype == np.uint8
    blocks = block_count(columns, block_size)
    r, c = read_codes(tensors, {"row_scale": (5, blocks, planes), "col_scale": (planes, columns)})
    block = np.arange(columns) // (columns if block_size == -1 else block_size)
    signs = read_signs(tensors["weight"], planes, columns, 128)
    np.testing.assert_allclose(sum(r[i][:, block] * c[i] * signs[i] for i in range(planes)), expected, rtol=1e-12)


def test_scales_in_8_bits_of_products():
    packed = pack_factors(random_factorized(9, 64, 40), 8)
    expected = unpack_factors(packed, 64).dequantize(torch.float64).numpy()
    tensors = {name: tensor.numpy() for name, tensor in packed.items()}
    shapes = {"row_scale": (9, 1), "inner_row_scale": (40, 1), "inner_col_scale": (64, 1)}
    a, m, b = (scale[0] for scale in read_codes(tensors, shapes))
    outer, inner = (read_signs(tensors[name], 1, k, 128)[0] for name, k in (("weight", 40), ("inner", 64)))
    np.testing.assert_allclose(a[:, None] * (outer * m) @ inner * b, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("columns", "block"), [(300, 128), (576, 256), (203, 64), (11, 128)])
@pytest.mark.parametrize("permuted", [False, True])
def test_hadamard_transforms(columns, block, permuted):
    layout = planes_layout(2, col_scale=True)
    weight = random_binarized(layout, 5, columns, 64, permuted, 0)
    weight.hadamard = block
    weight.input_signs = torch.rand(columns, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack(weight)
    tensors = {name: tensor.numpy() for name, tensor in packed.items()}
    expected = unpack(packed, layout, columns, 64, block).dequantize(torch.float64).numpy()
    read = Reader(tensors, columns, 64, 2, 2)
    stored = sum(read.r[i] * read.c[i] * read.signs[i] for i in range(2))
    sign = read_signs(tensors["input_signs"], 1, columns, 128)[0, 0]
    matrix = np.zeros((columns, columns))
    start = 0
    while start < columns:
        width = min(block, 1 << ((columns - start).bit_length() - 1))
        for j in range(width):
            for i in range(width):
                matrix[start + j, start + i] = (-1) ** (j & i).bit_count() / width**0.5
        start += width
    result = np.empty_like(expected)
    order = tensors["permutation"][0] if permuted else np.arange(columns)
    result[:, order] = (stored @ matrix) * sign
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)
