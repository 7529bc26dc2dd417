"""The memory of a fit: what binarizing one matrix holds at its worst, from its shape and its choices alone.

The figures are bytes for each entry of the calibration matrix, `[K, K]`, and of the weight, `[N, K]`. They were read
off fits of 512 x 512, 512 x 1408 and 1408 x 512, in which the bytes of all tensors were counted as they came and went,
and meet the largest sum within a tenth, but for a few that are said to hold up to a half more. A fit
has phases, of which the largest counts.
"""

from __future__ import annotations

import torch

from ..algorithms.admm import product_dtype
from ..config import BITMAP_METHODS, ARBConfig

# What regularizing and factorizing a calibration matrix takes, with its inverse and without.
WITH_INVERSE = 39
WITHOUT_INVERSE = 31
# What a Hadamard transform holds more: the matrix and the weight of the transformed columns.
ROTATED = (9, 4)


def fit_memory(rows: int, columns: int, config: ARBConfig, calibrated: bool, device: torch.device) -> int:
    """Bytes that binarizing a linear holds beside its weight and its calibration matrix.

    Args:
        rows, columns: N and K.
        config: the choices, overrides applied.
        calibrated: whether there is a calibration matrix.
        device: where it is fitted.
    """
    square, weight = columns**2, rows * columns
    if config.factorized:
        rank = config.resolved_rank(rows, columns)
        # the eigenvectors of H and the system of the column scales; the products of both factors with what is theirs
        return max(42 * square + 8 * weight, 16 * square + 8 * weight + 38 * (rows + columns) * rank)
    phases = [(8 if calibrated else 3) * square + 27 * weight]  # the errors of what came out
    if config.method in BITMAP_METHODS:
        # splits of a block are tried some at a time
        phases.append((12 if calibrated else 3) * square + 25 * weight + max(9_000_000, 18_500 * rows))
    elif config.method == "arb-hrc":
        planes = config.planes
        block = columns if config.block_size == -1 else min(config.block_size, columns)
        held = 16 if calibrated else 6
        # a block's system of column scales, in float64; its signs, column after column
        phases.append(held * square + (10 + 20 * planes) * weight + 26 * planes**2 * block**2)
        phases.append(held * square + (8 + 10 * planes) * weight + (16 + 34 * planes) * rows * block)
        if config.resolved_admm_iterations:
            # an inverse for the next penalty; what comes out of the search
            wider = product_dtype(device).itemsize - 2  # the figures are of products in bfloat16
            phases.append((29 + wider) * square + (16 + wider + 10 * planes) * weight)
            phases.append((21 + wider) * square + (10 + wider + 20 * planes) * weight)
    if calibrated:
        inverse = config.method != "arb-hrc" or not config.resolved_admm_iterations
        phases.append((WITH_INVERSE if inverse else WITHOUT_INVERSE) * square + 8 * weight)
    more = ROTATED if config.hadamard and calibrated else (0, 0)
    return max(phases) + more[0] * square + more[1] * weight
