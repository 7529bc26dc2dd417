"""Whole products of the one-bit kernel with real weights, its assembly run in an emulator."""

import numpy as np
import pytest
import torch
from emulated import (
    add_sum,
    check_joined,
    check_product,
    exact,
    multiply,
    plane_words,
    prepare,
    rows,
    scales_of_tiles,
    sign_word,
)
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton.prepack import Prepacked, prepack

LAYOUTS = {layout.name: layout for layout in all_layouts()}


def emulate(weight: Prepacked, x: torch.Tensor, part: int = 0, parts: int = 1) -> np.ndarray:
    """`[M, 32 G]` as the two kernels compute it for one part of the weights: all tiles side by side, then their sum."""
    count = len(weight.program.inputs)
    words, row_scale = plane_words(weight), scales_of_tiles(weight)
    groups, tiles = words.shape[1:3]
    index = weight.index if weight.index is None or parts == 1 else weight.index[part]
    out = []
    for token in x.float():
        gathered = token if index is None else token[index.long()]
        prepared = []
        for scale in weight.input_scale[part * count : (part + 1) * count]:
            scaled = torch.where(scale != 0, gathered * scale, 0.0).numpy()
            prepared.append(prepare(scaled.reshape(tiles, 128)))
        sums = np.zeros((4, groups, tiles, 32), dtype=np.float32)
        for i in range(count):
            for mask, row, source, factor in weight.program.terms:
                if source != i:
                    continue
                scale = np.moveaxis(row_scale[:, :, row] * np.float32(factor), -1, 0)  # [j, G, T, g]
                scale = np.repeat(scale, 4, axis=-1)
                if mask == 0:
                    sums = add_sum(prepared[i], scale, sums)
                else:
                    word = np.moveaxis(sign_word(words, mask), -1, 0)  # [j, G, T, lane]
                    sums = multiply(np.ascontiguousarray(word), prepared[i], scale, sums)
        out.append(rows(sums.sum(2, dtype=np.float32)).reshape(-1))
    return np.stack(out)


def check(packed: PackedWeight, tokens: int = 1) -> None:
    check_product(emulate, packed, tokens, bound=1e-4)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, block_size):
    check(random_packed(LAYOUTS[name], 42, 300, block_size, permuted=block_size == 128), tokens=2)


@pytest.mark.parametrize(
    ("count", "columns", "block_size", "permuted"),
    [
        (1, 64, 64, False),
        (1, 192, 64, True),
        (123, 192, 128, False),
        (42, 576, 256, True),
        (123, 576, -1, False),
        (42, 576, 64, False),
        (5, 4304, -1, True),
        (3, 4304, 128, False),
        (2, 3, 128, True),
    ],
)
@pytest.mark.parametrize("name", ["planes-1", "planes-3-mean", "groups-all-salient-col"])
def test_shapes(name, count, columns, block_size, permuted):
    check(random_packed(LAYOUTS[name], count, columns, block_size, permuted=permuted))


def test_inputs_of_very_different_size():
    """Each tile has a scale of its own: one huge input costs its own tile precision alone."""
    packed = random_packed(planes_layout(2, col_scale=True), 42, 384)
    x = torch.randn(1, 384, generator=torch.Generator().manual_seed(0))
    x[0, :128] *= 1e4
    without = x.clone()
    without[0, :128] = 0
    expected, _ = exact(packed, x)
    expected_small, _ = exact(packed, without)
    small = emulate(prepack(packed), without)[:, :42] - expected_small
    assert np.abs(small).max() < 1e-4 * np.abs(expected_small).max()
    error = emulate(prepack(packed), x)[:, :42] - expected
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("permuted", [False, True])
def test_joined_weights(permuted):
    check_joined(emulate, (42, 7, 64), 300, permuted, tokens=1, bound=1e-4)
