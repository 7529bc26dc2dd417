"""The kernel for five to sixteen tokens: its preparation in the interpreter, its assembly in an emulator."""

import itertools

import numpy as np
import ptx
import pytest
import torch
from emulated import check_joined, check_product, exact, plane_words, scales_of_tiles, sign_word
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import fragments, half_bits, half_bits_inputs, half_bits_kernels
from optimum_arb.ops.backends.triton.launch import power_of_2
from optimum_arb.ops.backends.triton.prepack import Prepacked, join, prepack, program

LAYOUTS = {layout.name: layout for layout in all_layouts()}


def prepare(x: torch.Tensor, weight: Prepacked, parts: int = 1, warpgroups: bool = False) -> np.ndarray:
    """int32 `[parts * inputs, T, ceil(M / 8), 544]`; for products of warpgroups `[..., T, ceil(M / 8) * 528]`."""
    inputs, tiles, token_tiles = len(weight.program.inputs), weight.tiles, -(-len(x) // 8)
    chunk = half_bits_inputs.WARPGROUP_CHUNK if warpgroups else half_bits_inputs.CHUNK
    out = torch.full((parts * inputs, tiles, token_tiles, chunk), -1, dtype=torch.int32)
    index = weight.input_scale if weight.index is None else weight.index
    half_bits_kernels._prepare[tiles, token_tiles, parts * inputs](
        x,
        weight.input_scale,
        index,
        out,
        tiles,
        x.stride(0),
        len(x),
        inputs,
        parts,
        INDEXED=weight.index is not None,
        OVERLAP=False,
        WARPGROUPS=warpgroups,
    )
    return (out.flatten(2) if warpgroups else out).numpy()


def warpgroup_inputs(words: np.ndarray, token_tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of int32 `[sources, T, 528 * token tiles]`: float16 `[sources, T, tokens, 128]` by slot, scales, corrections."""
    sources, tiles, _ = words.shape
    half = np.ascontiguousarray(words[..., : 512 * token_tiles]).view(np.float16)
    factors = np.ascontiguousarray(words[..., 512 * token_tiles :]).view(np.float32)
    token, slot = np.arange(8 * token_tiles)[:, None], np.arange(128)
    # of 16 columns a step: + 0 and + 2 of each four, then + 1 and + 3
    k = slot // 16 * 16 + slot % 2 * 8 + slot // 4 % 4 * 2 + slot // 2 % 2
    # rows of 128 bytes, the pieces of 16 bytes in the order of the hardware's swizzle
    byte = k // 64 * (1024 * token_tiles) + token * 128 + k % 64 * 2
    byte ^= (byte >> 7 & 7) << 4
    return half[..., byte // 2], *np.split(factors.reshape(sources, tiles, 2, -1), 2, axis=2)


def emulate(weight: Prepacked, x: torch.Tensor, part: int = 0, parts: int = 1) -> np.ndarray:
    """`[M, 32 G]` as the kernels compute it for one part of the weights: all tiles side by side, then their sum."""
    token_tiles, count = -(-len(x) // 8), len(weight.program.inputs)
    prepared = prepare(x, weight, parts)[part * count : (part + 1) * count]
    words, row_scale = plane_words(weight), scales_of_tiles(weight)
    groups, tiles = words.shape[1:3]
    sums = [np.zeros((groups, tiles, 32), dtype=np.uint32) for _ in range(8 * token_tiles)]
    for mask, row, source, factor in weight.program.terms:
        chunk = prepared[source].view(np.uint32)  # [T, token tiles, 544]
        operand = chunk[..., :512].reshape(tiles, token_tiles, 4, 32, 4)
        inputs = [operand[:, tile, q, :, j] for tile in range(token_tiles) for q in range(4) for j in range(4)]
        lane = np.arange(32) % 4 * 4
        factors = [chunk[:, tile, at + lane + j] for tile in range(token_tiles) for at in (512, 528) for j in range(4)]
        scale = np.repeat(np.moveaxis(row_scale[:, :, row] * np.float32(factor), -1, 0), 4, axis=-1)  # [j, G, T, lane]
        scales = [ptx.bits(each) for each in scale]
        if mask == 0:
            text, constraints = fragments.half_add_sum(token_tiles), fragments.half_add_sum_constraints(token_tiles)
            sums = ptx.run(text, constraints, [*factors, *scales, *sums])
        else:
            word = sign_word(words, mask)
            text, constraints = fragments.half_multiply(token_tiles), fragments.half_constraints(token_tiles)
            each = [np.ascontiguousarray(word[..., j]) for j in range(4)]
            sums = ptx.run(text, constraints, [*each, *inputs, *factors, *scales, *sums])
    # token tile, pair, half, token, G, T, g, t
    found = np.stack([ptx.floats(each) for each in sums]).reshape(token_tiles, 2, 2, 2, groups, tiles, 8, 4)
    found = found.sum(5, dtype=np.float32)
    return found.transpose(0, 6, 3, 4, 1, 2, 5).reshape(8 * token_tiles, 32 * groups)[: len(x)]


@pytest.mark.parametrize(("permuted", "tokens", "parts"), [(False, 16, 1), (True, 9, 2), (True, 13, 1)])
def test_inputs_of_warpgroups(permuted, tokens, parts):
    """The same numbers as for products of warps, where a right operand with 128 bytes a row is read from."""
    packed = [random_packed(LAYOUTS["planes-2-col"], 42, 320, permuted=permuted, seed=seed) for seed in range(parts)]
    weight = prepack(packed[0]) if parts == 1 else join([prepack(each) for each in packed])
    assert weight is not None
    x = torch.randn(tokens, 320, generator=torch.Generator().manual_seed(0))
    found, back, correction = warpgroup_inputs(prepare(x, weight, parts, warpgroups=True), -(-tokens // 8))
    expected = prepare(x, weight, parts)
    half = np.ascontiguousarray(expected[..., :512]).view(np.float16).reshape(*expected.shape[:3], 4, 8, 32)
    slot = np.arange(128)
    bit = slot // 16
    half = np.moveaxis(half[..., bit // 2, :, slot // 4 % 4 * 8 + bit % 2 * 4 + slot % 2 * 2 + slot // 2 % 2], 0, -1)
    factors = np.ascontiguousarray(expected[..., 512:]).view(np.float32).reshape(*expected.shape[:3], 2, 4, 2, 2)
    factors = factors[..., 0, :].reshape(*expected.shape[:3], 2, 8)
    assert (found == half.reshape(found.shape)).all()
    assert (back == factors[..., 1, :].reshape(back.shape)).all()
    wanted = (factors[..., 0, :] * factors[..., 1, :]).reshape(back.shape)
    np.testing.assert_allclose(correction, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())  # of another order of sums


def check(packed: PackedWeight, tokens: int) -> None:
    check_product(emulate, packed, tokens, bound=4e-4)  # rounding x to float16 is 2e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    check(random_packed(LAYOUTS[name], 42, 200, permuted=True), tokens=5)


@pytest.mark.slow  # the emulator takes its time: a second for a layout with many terms
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_in_blocks_of_64(name):
    check(random_packed(LAYOUTS[name], 42, 300, 64), tokens=5)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "block_size", "permuted", "tokens"),
    [
        ("planes-1", 1, 64, 64, False, 8),
        ("planes-3-mean", 7, 192, 64, True, 9),
        ("planes-2-col", 42, 320, -1, False, 16),
        pytest.param("planes-1", 5, 4304, 128, True, 13, marks=pytest.mark.slow),
        pytest.param("planes-3-mean", 5, 4304, 128, False, 13, marks=pytest.mark.slow),
    ],
)
def test_shapes(name, rows, columns, block_size, permuted, tokens):
    check(random_packed(LAYOUTS[name], rows, columns, block_size, permuted=permuted), tokens)


def test_joined_weights():
    check_joined(emulate, (42, 7, 32), 200, permuted=True, tokens=6, bound=4e-4)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-3, 1e5, 1e30])
def test_inputs_of_any_size(size):
    """Each token of each tile has a scale of its own: a huge or a tiny token costs no other its precision."""
    packed = random_packed(planes_layout(1, col_scale=True), 42, 256)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    x[3] *= size
    x[5, 100] *= 1e4
    expected, size_of = exact(packed, x)
    error = emulate(prepack(packed), x)[:, :42] - expected
    assert (np.linalg.norm(error, axis=1) <= 4e-4 * np.linalg.norm(size_of, axis=1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_with_its_token(bad):
    packed = random_packed(planes_layout(2), 42, 256)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0))
    x[2, 7] = bad
    out = emulate(prepack(packed), x)
    assert np.isnan(out[2, :42]).all()
    assert np.isfinite(np.delete(out, 2, 0)).all()


def test_zeros_and_rows_alone():
    """Zeros give zeros, and a token's sums do not depend on the others."""
    packed = random_packed(planes_layout(1, col_scale=True), 42, 256, permuted=True)
    weight = prepack(packed)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    out = emulate(weight, x)
    assert not out[1].any()
    assert (emulate(weight, x[:5]) == out[:5]).all()
    assert (emulate(weight, torch.cat([x, 1e6 * x]))[:8] == out).all()


@pytest.mark.parametrize("tiles", [1, 2, 5, 32, 86, 108, 224, 416])
def test_slices_fit_the_memory_and_take_every_tile(tiles):
    """Whatever is asked for, of the most inputs that a layout has and of few."""
    most_inputs = max(len(program(layout).inputs) for layout in LAYOUTS.values())
    for inputs in (1, most_inputs):
        most = (96 << 10) // (inputs * 2 * half_bits.TILE_SHARED)
        assert most >= 2
        for asked in (1, 2, 3, 8, 64):
            for ahead in (1, 2, 3, 4, 8):
                config = half_bits.HalfConfig(ahead=ahead, slice_tiles=asked)
                slices, steps, found = half_bits._slices(config, tiles, most)
                ends = [i * tiles // slices for i in range(slices + 1)]  # as the kernel cuts them
                longest = max(end - start for start, end in itertools.pairwise(ends))
                assert longest <= min(asked, steps)
                assert power_of_2(steps) <= most
                assert 1 <= found <= ahead
                assert steps % found == 0
                assert steps - found < longest, "a round without a tile"


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (128, 4096), (4096, 11008), (28672, 8192), (8192, 28672)])
def test_there_are_cuts_to_time_for_any_shape(rows, columns):
    for tokens in (5, 16):
        cuts = half_bits.candidates(rows, columns, tokens, 132)
        assert 1 <= len(cuts) == len(set(cuts)) <= 150
        assert {cut.warpgroups for cut in cuts} == ({True} if tokens <= 8 else {True, False})
        for cut in cuts:
            chunk = half_bits.WARPGROUP_TILE_SHARED if cut.warpgroups and tokens > 8 else half_bits.TILE_SHARED
            assert power_of_2(cut.slice_tiles) * -(-tokens // 8) * chunk <= half_bits.HOPPER_SHARED
