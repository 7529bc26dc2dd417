"""The fused product in plain Triton, for every layout without salient columns and every GPU.

A tile of the weight is decoded into registers and multiplied by the tokens' columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..packed import PackedWeight
from .columns import gather_columns
from .decode import arguments, decode_tile
from .gemm_config import GemmConfig, split_of
from .launch import Launcher, cdiv, size_class, tensor_class
from .sums import Parts, Sum


@triton.jit(do_not_specialize=["M", "row_stride", "tiles_per_block"])
def _gemm_kernel(
    out,
    x,
    bias,
    M,
    x_stride,
    weight,
    row_scale,
    col_scale,
    salient_columns,
    salient_weight,
    salient_col_scale,
    N,
    K,
    weight_stride,
    row_stride,
    tiles_per_block,
    salient,
    salient_stride,
    TERMS: tl.constexpr,
    PLANES: tl.constexpr,
    SALIENT_PLANES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COL_SCALES: tl.constexpr,
    SALIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[m, n] (or [split, m, n], summed later): computed as W x^T, so that the decoded weight stays in registers."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # neighbouring programs share rows of the weight or of x: GROUP tiles of rows times all tiles of tokens in turn
    program = tl.program_id(0)
    group = program // (GROUP * tiles_m)
    height = tl.minimum(tiles_n - group * GROUP, GROUP)
    inside = program - group * GROUP * tiles_m
    tile_n = group * GROUP + inside % height
    tile_m = inside // height
    split = tl.program_id(1)

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, TILE)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride
    whole = K // TILE
    share = tl.cdiv(whole, SPLIT_K)
    start = split * share
    stop = tl.minimum(start + share, whole)
    packed = (
        weight, row_scale, col_scale, salient_columns, salient_weight, salient_col_scale,
        K, weight_stride, row_stride, tiles_per_block, salient, salient_stride,
    )  # fmt: skip
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(start, stop):
        w = decode_tile(
            packed,
            rows,
            tile,
            TERMS,
            PLANES,
            SALIENT_PLANES,
            ROW_SCALES,
            COL_SCALES,
            SALIENT,
            ONE_BLOCK,
            TILE,
            WORDS,
            True,
        ).to(x.dtype.element_ty)
        tokens = tl.load(x_rows + tile * TILE + k[None, :])
        if UPCAST:
            sums = tl.dot(w.to(tl.float32), tl.trans(tokens.to(tl.float32)), sums)
        else:
            sums = tl.dot(w, tl.trans(tokens), sums)
    if (split == SPLIT_K - 1) & (whole * TILE < K):
        w = decode_tile(
            packed,
            rows,
            whole,
            TERMS,
            PLANES,
            SALIENT_PLANES,
            ROW_SCALES,
            COL_SCALES,
            SALIENT,
            ONE_BLOCK,
            TILE,
            WORDS,
            False,
        ).to(x.dtype.element_ty)
        tokens = tl.load(x_rows + whole * TILE + k[None, :], mask=(whole * TILE + k < K)[None, :], other=0)
        if UPCAST:
            sums = tl.dot(w.to(tl.float32), tl.trans(tokens.to(tl.float32)), sums)
        else:
            sums = tl.dot(w, tl.trans(tokens), sums)
    if HAS_BIAS:
        sums += tl.load(bias + rows).to(tl.float32)[:, None]
    at = out + split.to(tl.int64) * M * N + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


_gemm = Launcher(_gemm_kernel)


def multiply(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype, config: GemmConfig
) -> torch.Tensor:
    if packed.permutation is not None:
        x = gather_columns(x, packed)
    elif x.stride(1) != 1:
        x = x.contiguous()
    split_k = split_of(config, packed)
    filled = _output(x.shape[0], packed.out_features, split_k, out_dtype, x.device)
    args = arguments(packed)
    has_bias = bias is not None and split_k == 1
    constants = (has_bias, split_k, 8, not x.is_cuda, config.block_m, config.block_n)
    _gemm(
        (
            tensor_class(x),
            size_class(x.stride(0)),
            filled.dtype,
            None if bias is None else tensor_class(bias),
            constants,
            config.warps,
            config.stages,
            args.key,
        ),
        (cdiv(x.shape[0], config.block_m) * cdiv(packed.out_features, config.block_n), split_k, 1),
        (
            filled,
            x,
            filled if bias is None else bias,
            x.shape[0],
            x.stride(0),
            *args.tensors,
            *args.sizes,
            *args.constants.values(),
            *constants,
        ),
        x.device,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return _finish(filled, bias, out_dtype)


def _output(m: int, n: int, split_k: int, out_dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a kernel fills: the result, or the parts of its sums."""
    if split_k == 1:
        return torch.empty(m, n, dtype=out_dtype, device=device)
    return torch.empty(split_k, m, n, dtype=torch.float32, device=device)


def _finish(filled: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    if filled.dim() == 2:
        return filled
    out = torch.empty(filled.shape[1:], dtype=out_dtype, device=filled.device)
    split_k, tokens, rows = filled.shape
    Sum([Parts(split_k, rows, bias)], tokens, out_dtype, filled.device)((filled, bias, out))
    return out
