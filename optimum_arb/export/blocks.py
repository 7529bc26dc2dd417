"""The block formats of ggml that hold `scale * sign` exactly: Q1_0 and Q4_0.

| type | columns of a block | bytes of a block | value of column j |
|---|---|---|---|
| Q1_0 | 128 | fp16 d, then 16 bytes: bit `j % 8` of byte `j / 8` is b | `d` where b is 1, `-d` where it is 0 |
| Q4_0 | 32 | fp16 d, then 16 bytes: q is the low half of byte j, or the high half of byte j - 16 | `d * (q - 8)` |

(`block_q1_0` and `block_q4_0` of ggml-common.h and their `dequantize_row_*` in ggml-quants.c.) A sign is q = 9 or q = 7
in Q4_0: 4.5 bits a weight instead of 1.125, for columns that 128 does not divide.
"""

from __future__ import annotations

import numpy as np

BLOCKS = {"Q1_0": 128, "Q4_0": 32}


def sign_blocks(signs: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
    """Packs `scale * sign` into blocks.

    Args:
        signs: bool `[N, K]`, True = +1; K is a multiple of the block.
        scale: float16 `[N, K / block]`, one a block.
        kind: "Q1_0" or "Q4_0".

    Returns:
        uint8 `[N, bytes of a row]`.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, columns = signs.shape
    width = BLOCKS[kind]
    if columns % width or scale.shape != (rows, columns // width) or scale.dtype != np.float16:
        raise ValueError(
            f"{kind} packs whole blocks of {width} columns, one float16 scale each: signs {signs.shape} and scales "
            f"{scale.dtype} {scale.shape} do not fit."
        )
    parts = signs.reshape(rows, -1, width)
    if kind == "Q1_0":
        bits = np.packbits(parts, axis=2, bitorder="little")
    else:
        values = np.where(parts, np.uint8(9), np.uint8(7))
        bits = values[:, :, :16] | (values[:, :, 16:] << 4)
    head = np.ascontiguousarray(scale.astype("<f2")).view(np.uint8).reshape(rows, -1, 2)
    return np.concatenate([head, bits], 2).reshape(rows, -1)


def decode_blocks(blocks: np.ndarray, kind: str) -> np.ndarray:
    """The values of blocks of Q1_0 or Q4_0: uint8 `[N, bytes]` to float32 `[N, K]`."""
    rows = blocks.shape[0]
    parts = blocks.reshape(rows, -1, 2 + 16)
    scale = np.ascontiguousarray(parts[:, :, :2]).view("<f2").astype(np.float32)
    if kind == "Q1_0":
        bits = np.unpackbits(np.ascontiguousarray(parts[:, :, 2:]), axis=2, bitorder="little")
        return np.where(bits == 1, scale, -scale).reshape(rows, -1)
    codes = np.concatenate([parts[:, :, 2:] & 15, parts[:, :, 2:] >> 4], 2).astype(np.float32)
    return (scale * (codes - 8)).reshape(rows, -1)
