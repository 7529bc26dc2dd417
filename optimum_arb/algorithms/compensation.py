"""The block loop: columns are binarized block by block, and later columns make up for the error (GPTQ, arXiv
2210.17323)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .hessian import PreparedHessian

Fit = TypeVar("Fit")


def binarize_blocks(
    weight: torch.Tensor,
    hessian: PreparedHessian,
    block_size: int,
    compensation: str,
    fit_block: Callable[[torch.Tensor, int, int], tuple[torch.Tensor, Fit]],
) -> list[Fit]:
    """Fits every block and compensates its error `E = W_b - Q_b` in the columns that follow.

    "exact": `W_rest -= E U_bb^-1 U_{b,rest}`, the least-squares answer: of all later columns, given this block.
    "diagonal": `W_rest -= (E / diag(U_bb)) U_{b,rest}`, as BiLLM and ARB-LLM released it: GPTQ's update of one column,
    used for a whole block at once.

    Args:
        weight: float32 `[N, K]`, columns in the order of `hessian`; changed in place.
        hessian: the prepared calibration matrix.
        block_size: columns of a block; the last block holds what is left.
        compensation: "exact" or "diagonal".
        fit_block: `(W_b [N, k], start, stop) -> (Q_b [N, k], what to keep)`.

    Returns:
        What `fit_block` gave to keep, block by block.
    """
    columns = weight.shape[1]
    fits = []
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = weight[:, start:stop]
        reconstruction, fit = fit_block(block, start, stop)
        fits.append(fit)
        if stop == columns:
            break
        error = block - reconstruction
        if compensation == "exact":
            pushed = error @ hessian.factor[start:stop, start:stop]
        else:
            pushed = error / hessian.inverse_factor.diagonal()[start:stop]
        weight[:, stop:] -= pushed @ hessian.inverse_factor[start:stop, stop:]
    return fits
