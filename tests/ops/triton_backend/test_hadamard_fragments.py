"""The Hadamard transform within a warp, its assembly run in an emulator."""

import numpy as np
import ptx
import pytest
import torch

from optimum_arb.format.hadamard import hadamard_blocks, hadamard_transform
from optimum_arb.ops.backends.triton import hadamard_fragments as fragments


def unscaled(x: np.ndarray, block: int) -> np.ndarray:
    """Of integers `[..., K]`, exactly: each block of `hadamard_blocks` times its matrix of +1 and -1."""
    widths = np.repeat(*[np.array(hadamard_blocks(x.shape[-1], block))] * 2)
    return np.rint(hadamard_transform(torch.from_numpy(x).double(), block).numpy() * np.sqrt(widths))


def transform(x: np.ndarray, stages: int, columns: int | None = None) -> np.ndarray:
    """float32 `[..., 128]` to the same; with a number of columns by the fragment that asks for it."""
    lanes = x.astype(np.float32).reshape(*x.shape[:-1], 32, 4)
    inputs = [ptx.bits(lanes[..., j]) for j in range(4)]
    ragged = columns is not None
    if ragged:
        inputs += [np.full(32, columns, dtype=np.uint32)] * 4
    found = ptx.run(fragments.butterflies(stages, ragged), fragments.butterflies_constraints(ragged), inputs)
    return np.stack([ptx.floats(each) for each in found], -1).reshape(x.shape)


@pytest.mark.parametrize("stages", range(fragments.STAGES + 1))
def test_whole_tiles(stages):
    x = np.random.default_rng(0).integers(-9, 9, (5, 128)).astype(np.float32)
    expected = unscaled(x, 1 << stages)
    assert (transform(x, stages) == expected).all()
    assert (transform(x, stages, 128) == expected).all()


@pytest.mark.parametrize("columns", range(1, 129))
def test_what_is_left_is_cut_into_powers_of_two(columns):
    x = np.random.default_rng(columns).integers(-9, 9, (2, 128)).astype(np.float32)
    x[:, columns:] = 0
    for stages in (4, 6, 7):
        found = transform(x, stages, columns)
        assert (found[:, :columns] == unscaled(x[:, :columns], 1 << stages)).all()
        assert not found[:, columns:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_block(bad):
    x = np.ones((1, 128), dtype=np.float32)
    x[0, 70] = bad
    found = transform(x, 7, 100)[0]  # blocks of 64, 32 and 4
    assert np.isfinite(found[:64]).all()
    assert not np.isfinite(found[64:96]).any()
    assert np.isfinite(found[96:100]).all()


def test_gather():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 32, 4)).astype(np.float32)
    source = generator.integers(0, 128, (3, 32, 4)).astype(np.uint32)
    inputs = [ptx.bits(x[..., j]) for j in range(4)] + [np.ascontiguousarray(source[..., j]) for j in range(4)]
    found = ptx.run(fragments.gather(), fragments.GATHER_CONSTRAINTS, inputs)
    expected = np.take_along_axis(x.reshape(3, 128), source.reshape(3, 128).astype(np.int64), -1)
    assert (np.stack([ptx.floats(each) for each in found], -1).reshape(3, 128) == expected).all()
