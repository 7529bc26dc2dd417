"""What the tests of the kernels' assembly share: prepacked weights as their lanes see them, and the one-bit fragments.

The assembly runs in the emulator of `ptx.py`, all groups and tiles side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ptx
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import fragments
from optimum_arb.ops.backends.triton.prepack import Prepacked, join, prepack

LANE = np.arange(32) % 4
# (prepacked weights, x [M, K], part, parts) -> [M, 32 G]
Emulate = Callable[[Prepacked, torch.Tensor, int, int], np.ndarray]


# Prepacked weights


def plane_words(weight: Prepacked) -> np.ndarray:
    """uint32 `[planes, G, T, 32 lanes, 4 (j)]`."""
    words = weight.words.numpy().view(np.uint32)  # [G, T, planes, 8, 4, 4]
    groups, tiles, planes = words.shape[:3]
    return np.moveaxis(words.reshape(groups, tiles, planes, 32, 4), 2, 0)


def scales_of_tiles(weight: Prepacked) -> np.ndarray:
    """float32 `[G, T, row scales, 8 (g), 4 (j)]`."""
    block = np.arange(weight.tiles) // weight.tiles_per_block
    return weight.row_scale.float().numpy()[:, block]


def sign_word(words: np.ndarray, mask: int) -> np.ndarray:
    """The product of planes: equal signs give +1, so XNOR, and XOR of three."""
    chosen = [word for plane, word in enumerate(words) if mask >> plane & 1]
    found = np.bitwise_xor.reduce(chosen)
    return ~found if len(chosen) == 2 else found


# Whole products


def exact(packed: PackedWeight, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`[M, N]` in float64: the product, and the size of a sum of such terms of random signs."""
    dense = packed.unpack().dequantize(torch.float64)
    return (x.double() @ dense.T).numpy(), (x.double().square() @ dense.square().T).sqrt().numpy()


def check_product(emulate: Emulate, packed: PackedWeight, tokens: int, bound: float, seed: int = 0) -> None:
    """An emulated product is within `bound` of the exact one, relatively."""
    x = torch.randn(tokens, packed.in_features, generator=torch.Generator().manual_seed(seed))
    expected, size = exact(packed, x)
    out = emulate(prepack(packed), x, 0, 1)
    assert not out[:, packed.out_features :].any()  # the rows that fill the last group
    assert np.linalg.norm(out[:, : packed.out_features] - expected) <= bound * np.linalg.norm(size)


def check_joined(
    emulate: Emulate, counts: tuple[int, ...], columns: int, permuted: bool, tokens: int, bound: float
) -> None:
    """The same of each of several weights of one input, with its own columns' order and scales."""
    layout = planes_layout(2, col_scale=True)
    parts = [random_packed(layout, count, columns, permuted=permuted, seed=seed) for seed, count in enumerate(counts)]
    joined = join([prepack(part) for part in parts])
    assert joined is not None
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3))
    group = 0
    for number, part in enumerate(parts):
        out = emulate(joined, x, number, len(parts))[:, 32 * group :][:, : part.out_features]
        expected, _ = exact(part, x)
        assert np.linalg.norm(out - expected) < bound * np.linalg.norm(expected)
        group += -(-part.out_features // 32)


# The one-bit kernel's fragments


def prepare(x: np.ndarray, rcp_error: int = 0) -> list[np.ndarray]:
    """float32 `[..., 128]` to low, high, scale and correction, `[..., 32]`."""
    lanes = x.astype(np.float32).reshape(*x.shape[:-1], 32, 4)
    inputs = [ptx.bits(lanes[..., j]) for j in range(4)]
    return ptx.run(fragments.prepare(), fragments.PREPARE_CONSTRAINTS, inputs, rcp_error)


def multiply(words, prepared, row_scale, sums) -> np.ndarray:
    """Row sums `[4 (j), ..., 32]`, in units of 4^t, after one plane and tile."""
    relative = ptx.bits(np.where(LANE == 3, -2, 2).astype(np.int32))
    scales, before = (list(map(ptx.bits, np.asarray(value, dtype=np.float32))) for value in (row_scale, sums))
    operands = [*words, *prepared, *scales, *before, *[relative] * 4]
    found = ptx.run(fragments.multiply(), fragments.MULTIPLY_CONSTRAINTS, operands)
    return np.stack([ptx.floats(value) for value in found])


def add_sum(prepared, row_scale, sums) -> np.ndarray:
    scales, before = (list(map(ptx.bits, np.asarray(value, dtype=np.float32))) for value in (row_scale, sums))
    found = ptx.run(fragments.add_sum(), fragments.ADD_SUM_CONSTRAINTS, [*prepared, *scales, *before])
    return np.stack([ptx.floats(value) for value in found])


def rows(sums: np.ndarray) -> np.ndarray:
    """`[4 (j), ..., 32 lanes]` to the sums of the 32 rows, `[..., 32]` float64."""
    weighted = sums.astype(np.float64) * 4.0**LANE
    per_row = weighted.reshape(*sums.shape[:-1], 8, 4).sum(-1)  # [j, ..., g]
    return np.moveaxis(per_row, 0, -2).reshape(*sums.shape[1:-1], 32)
