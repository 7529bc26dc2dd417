"""The assembly of the one-bit kernel, run in an emulator: its fragments alone, and whole products with real weights."""

import numpy as np
import ptx
import pytest
import torch
from packed_weights import random_packed

from optimum_arb.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import fragments
from optimum_arb.ops.backends.triton.fragments import FIXED_MAX, LANE_WEIGHTS
from optimum_arb.ops.backends.triton.prepack import Prepacked, join, prepack

LAYOUTS = {layout.name: layout for layout in all_layouts()}
G, T = np.arange(32) // 4, np.arange(32) % 4
PLANE_WEIGHTS = np.array([2**b for b in range(15)] + [-(2**15)])


def prepare(x: np.ndarray, rcp_error: int = 0) -> list[np.ndarray]:
    """float32 `[..., 128]` to low, high, scale and correction, `[..., 32]`."""
    lanes = x.astype(np.float32).reshape(*x.shape[:-1], 32, 4)
    inputs = [ptx.bits(lanes[..., j]) for j in range(4)]
    return ptx.run(fragments.prepare(), fragments.PREPARE_CONSTRAINTS, inputs, rcp_error)


def fixed_point(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The integers `[..., 128]` that bit planes stand for: bit 8 j + g of word t is that of slot 16 g + 4 t + j."""
    planes = np.concatenate([word.reshape(*word.shape[:-1], 8, 4) for word in (low, high)], -2)  # [..., 16, 4]
    bit = planes[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)  # [..., 16, t, 8 j + g]
    value = np.einsum("p,...ptb->...tb", PLANE_WEIGHTS, bit.astype(np.int64))
    value = value.reshape(*value.shape[:-1], 4, 8)  # [..., t, j, g]
    return np.moveaxis(value, -1, -3).reshape(*value.shape[:-3], 128)


def inputs_of_a_tile(kind: str) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    if kind == "one huge":
        x[:, 77] = 3e30
    elif kind == "negative largest":
        x[:, 5] = -50
    elif kind == "all equal":
        x[:] = -0.3
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "mixed sizes":
        x *= np.logspace(-6, 3, 128, dtype=np.float32)
    return x


@pytest.mark.parametrize("rcp_error", [-1, 0, 1])
@pytest.mark.parametrize("kind", ["random", "one huge", "negative largest", "all equal", "tiny", "mixed sizes"])
def test_prepare(kind, rcp_error):
    x = inputs_of_a_tile(kind)
    low, high, scale, correction = prepare(x, rcp_error)
    value = fixed_point(low, high)
    unit = np.abs(x).max(1, keepdims=True).astype(np.float64) / FIXED_MAX
    assert (np.abs(value) <= 32767).all()
    assert (np.abs(value).max(1) >= FIXED_MAX - 1).all()
    # half a unit of rounding, and three roundings to float32 of a value up to 32766
    assert (np.abs(value * unit - x) <= 0.51 * unit).all()
    np.testing.assert_allclose(ptx.floats(scale), np.broadcast_to(2 * unit, (5, 32)), rtol=2e-7)
    expected = value.sum(1, keepdims=True) / (2 * LANE_WEIGHTS)
    np.testing.assert_allclose(ptx.floats(correction), np.broadcast_to(expected, (5, 32)), rtol=2e-7)


def test_prepare_zeros():
    low, high, scale, correction = prepare(np.zeros((2, 128)))
    for word in (low, high, scale, correction):
        assert not word.any()


def test_every_input_has_its_own_bits():
    """One input at a time: a wrong exchange of lanes would put its bits elsewhere."""
    x = np.eye(128)
    low, high, _, _ = prepare(x)
    assert (fixed_point(low, high) == x * FIXED_MAX).all()
    low, high, _, _ = prepare(-x)
    assert (fixed_point(low, high) == -x * FIXED_MAX).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_a_number_is_not_hidden(bad):
    x = inputs_of_a_tile("random")
    x[0, 64] = bad
    words = prepare(x)
    scale = ptx.floats(words[2])
    assert not np.isfinite(scale[0]).any()
    assert np.isfinite(scale[1:]).all()
    sums = multiply(random_words((5,)), words, np.ones((4, 32)), np.zeros((4, 32)))
    assert not np.isfinite(sums[:, 0]).any()
    assert np.isfinite(sums[:, 1:]).all()


def random_words(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Sign words `[4 (j), ..., 32]`: word t of row 8 j + g."""
    return np.random.default_rng(seed).integers(0, 2**32, (4, *shape, 32), dtype=np.uint32)


def multiply(words, prepared, row_scale, sums) -> np.ndarray:
    """Row sums `[4 (j), ..., 32]`, in units of 4^t, after one plane and tile."""
    relative = ptx.bits(np.where(T == 3, -2, 2).astype(np.int32))
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
    weighted = sums.astype(np.float64) * 4.0**T
    per_row = weighted.reshape(*sums.shape[:-1], 8, 4).sum(-1)  # [j, ..., g]
    return np.moveaxis(per_row, 0, -2).reshape(*sums.shape[1:-1], 32)


def signs_of(words: np.ndarray) -> np.ndarray:
    """+1 and -1 `[..., 32 rows, 128 slots]`."""
    word = words.reshape(*words.shape[:-1], 8, 4)
    bit = (word[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.int64)
    bit = bit.reshape(*word.shape, 4, 8)  # [j_row, ..., g_row, t, j, g]
    bit = np.moveaxis(bit, -1, -3).reshape(*word.shape[:-1], 128)  # [j_row, ..., g_row, 128]
    bit = np.moveaxis(bit, 0, -3)
    return 2 * bit.reshape(*bit.shape[:-3], 32, 128) - 1


@pytest.mark.parametrize("kind", ["random", "one huge", "negative largest", "all equal", "mixed sizes"])
def test_multiply_and_add_sum(kind):
    prepared = prepare(inputs_of_a_tile(kind))
    value = fixed_point(*prepared[:2]) * (ptx.floats(prepared[2])[:, :1].astype(np.float64) / 2)
    generator = np.random.default_rng(2)
    words = random_words((5,))
    words[:, 1] = 0xFFFFFFFF  # all signs +1, then all -1
    words[:, 2] = 0
    per_row = generator.standard_normal((4, 8)).astype(np.float32)  # [j, g]
    row_scale = np.repeat(per_row, 4, axis=1)[:, None, :] * np.ones((4, 5, 32), dtype=np.float32)
    scale = per_row.reshape(32).astype(np.float64)
    expected = scale * np.einsum("wrk,wk->wr", signs_of(words), value)
    # lane 3 counts in steps of 64 units of the fixed point, whose float32 sums are 2^-24 off
    unit = ptx.floats(prepared[2])[:, :1].astype(np.float64) / 2
    size = np.abs(scale) * (3e-7 * np.abs(value).sum(1, keepdims=True) + unit)
    zero = np.zeros_like(row_scale)
    sums = multiply(words, prepared, row_scale, zero)
    assert (np.abs(rows(sums) - expected) <= size).all()
    # on top of what is there
    sums = add_sum(prepared, row_scale, sums)
    expected = expected + scale * value.sum(1, keepdims=True)
    assert (np.abs(rows(sums) - expected) <= 2 * size).all()
    sums = multiply(words, prepared, -row_scale, sums)
    assert (np.abs(rows(sums) - scale * value.sum(1, keepdims=True)) <= 3 * size).all()


def test_emulator_refuses():
    def attempt(body, constraints="=r,r"):
        return ptx.run("{ .reg .b32 a; .reg .f32 f; " + body + " }", constraints, [np.arange(32, dtype=np.uint32)])

    assert (attempt("mov.b32 a, $1; add.s32 a, a, 1; mov.b32 $0, a;")[0] == np.arange(1, 33)).all()
    with pytest.raises(NotImplementedError, match="unknown instruction: frob"):
        attempt("frob.b32 a, $1;")
    with pytest.raises(AssertionError, match="f is f32, not s32"):
        attempt("mov.b32 f, $1; add.s32 a, f, 1;")
    with pytest.raises(AssertionError, match=r"\$1 may have become an output"):
        attempt("mov.b32 $0, 1; add.s32 a, $1, 1;")
    with pytest.raises(AssertionError, match="a has no value yet"):
        attempt("add.s32 a, a, 1;")
    assert (attempt("mov.b32 $0, 1; add.s32 $0, $1, $0;", "=&r,r")[0] == np.arange(1, 33)).all()


# Whole products


def sign_word(words: list[np.ndarray], mask: int) -> np.ndarray:
    """The product of planes: equal signs give +1, so XNOR, and XOR of three."""
    chosen = [word for plane, word in enumerate(words) if mask >> plane & 1]
    found = np.bitwise_xor.reduce(chosen)
    return ~found if len(chosen) == 2 else found


def emulate(weight: Prepacked, x: torch.Tensor, part: int = 0, parts: int = 1) -> np.ndarray:
    """`[M, 32 G]` as the two kernels compute it for one part of the weights: all tiles side by side, then their sum."""
    count = len(weight.program.inputs)
    words = weight.words.numpy().view(np.uint32)  # [G, T, planes, 8, 4, 4]
    groups, tiles, planes = words.shape[:3]
    words = np.moveaxis(words.reshape(groups, tiles, planes, 32, 4), 2, 0)  # [planes, G, T, lane, j]
    block = np.arange(tiles) // weight.tiles_per_block
    row_scale = weight.row_scale.float().numpy()[:, block]  # [G, T, row scales, g, j]
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
                    word = np.moveaxis(sign_word(list(words), mask), -1, 0)  # [j, G, T, lane]
                    sums = multiply(np.ascontiguousarray(word), prepared[i], scale, sums)
        out.append(rows(sums.sum(2, dtype=np.float32)).reshape(-1))
    return np.stack(out)


def check(packed: PackedWeight, tokens: int = 1, seed: int = 0) -> None:
    x = torch.randn(tokens, packed.in_features, generator=torch.Generator().manual_seed(seed))
    dense = packed.unpack().dequantize(torch.float64)
    expected = (x.double() @ dense.T).numpy()
    size = (x.double().square() @ dense.square().T).sqrt().numpy()  # of a sum of terms of random signs
    out = emulate(prepack(packed), x)
    assert not out[:, packed.out_features :].any()  # the rows that fill the last group
    assert np.linalg.norm(out[:, : packed.out_features] - expected) <= 1e-4 * np.linalg.norm(size)


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
    dense = packed.unpack().dequantize(torch.float64)
    small = emulate(prepack(packed), without)[0, :42] - (without.double() @ dense.T).numpy()[0]
    assert np.abs(small).max() < 1e-4 * np.abs((without.double() @ dense.T).numpy()).max()
    error = emulate(prepack(packed), x)[0, :42] - (x.double() @ dense.T).numpy()[0]
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm((x.double() @ dense.T).numpy())


@pytest.mark.parametrize("permuted", [False, True])
def test_joined_weights(permuted):
    """Each part of several weights of one input, with its own columns' order and scales."""
    parts = [
        random_packed(planes_layout(2, col_scale=True), count, 300, permuted=permuted, seed=seed)
        for seed, count in enumerate((42, 7, 64))
    ]
    joined = join([prepack(part) for part in parts])
    assert joined is not None
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(3))
    group = 0
    for number, part in enumerate(parts):
        out = emulate(joined, x, number, len(parts))[0, 32 * group :][: part.out_features]
        expected = (x.double() @ part.unpack().dequantize(torch.float64).T).numpy()[0]
        assert np.linalg.norm(out - expected) < 1e-4 * np.linalg.norm(expected)
        group += -(-part.out_features // 32)
