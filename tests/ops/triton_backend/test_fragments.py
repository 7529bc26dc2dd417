"""The one-bit kernel's fragments, run in an emulator: their preparation of inputs, and one tile of a product."""

import numpy as np
import ptx
import pytest
from emulated import add_sum, multiply, prepare, rows

from optimum_arb.ops.backends.triton.fragments import FIXED_MAX, LANE_WEIGHTS

PLANE_WEIGHTS = np.array([2**b for b in range(15)] + [-(2**15)])


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
