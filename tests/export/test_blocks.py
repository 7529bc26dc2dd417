import ctypes
import struct
from pathlib import Path

import numpy as np
import pytest

from optimum_arb.export.blocks import decode_blocks, sign_blocks


@pytest.fixture
def signs():
    return np.random.default_rng(0).random((5, 256)) < 0.4


def scales(count):
    return np.random.default_rng(1).normal(size=(5, count)).astype(np.float16)


def test_q1_0_bit_by_bit(signs):
    scale = scales(2)
    blocks = sign_blocks(signs, scale, "Q1_0")
    assert blocks.shape == (5, 36)
    for row, block, column in ((0, 0, 0), (3, 0, 77), (4, 1, 9), (2, 1, 127)):
        start = block * 18
        (stored,) = struct.unpack("<e", blocks[row, start : start + 2].tobytes())
        bit = blocks[row, start + 2 + column // 8] >> (column % 8) & 1
        assert stored == scale[row, block]
        assert bit == signs[row, block * 128 + column]


@pytest.mark.parametrize(("kind", "count"), [("Q1_0", 2), ("Q4_0", 8)])
def test_values_are_the_scale_times_the_sign(signs, kind, count):
    scale = scales(count)
    expected = np.where(signs, 1.0, -1.0) * np.repeat(scale.astype(np.float32), 256 // count, axis=1)
    assert np.array_equal(decode_blocks(sign_blocks(signs, scale, kind), kind), expected)


def test_q4_0_as_the_package_gguf_reads_it(signs):
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    blocks = sign_blocks(signs, scales(8), "Q4_0")
    assert np.array_equal(quants.dequantize(blocks, GGMLQuantizationType.Q4_0), decode_blocks(blocks, "Q4_0"))


def test_q1_0_as_llama_cpp_reads_it(signs):
    package = pytest.importorskip("llama_cpp")
    libraries = list((Path(package.__file__).parent / "lib").glob("libggml-base.*"))
    if not libraries:
        pytest.skip("llama_cpp has no separate libggml-base")
    read = ctypes.CDLL(str(libraries[0])).dequantize_row_q1_0
    blocks = np.ascontiguousarray(sign_blocks(signs, scales(2), "Q1_0"))
    out = np.zeros((5, 256), np.float32)
    read(blocks.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    assert np.array_equal(out, decode_blocks(blocks, "Q1_0"))


def test_what_does_not_fit(signs):
    with pytest.raises(ValueError, match="Q1_0 packs whole blocks of 128"):
        sign_blocks(signs[:, :200], scales(2), "Q1_0")
    with pytest.raises(ValueError, match="do not fit"):
        sign_blocks(signs, scales(2).astype(np.float32), "Q1_0")
