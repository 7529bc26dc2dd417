"""The input in the order in which a weight's columns are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..packed import PackedWeight

ROWS, COLUMNS = 8, 512
# From this many tokens on whole rows are permuted in shared memory: single elements gathered from memory move 0.6 TB/s
# on an H200 (2048 x 4096: 53 us, where reading and writing them takes 8).
ROW_TOKENS = 64
MAX_ROW = 2**15  # columns of a row: 64 KiB of shared memory


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends: from sm_90 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def _gather_kernel(
    out, x, permutation, scale, M, K, x_stride, out_stride,
    PERMUTED: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[m, k] = x[m, permutation[k]] * scale[k], zero where k >= K."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = k < K
    source = k
    if PERMUTED:
        source = tl.load(permutation + k, mask=inside, other=0).to(tl.int32)
    mask = (m < M)[:, None] & inside[None, :]
    values = tl.load(x + m.to(tl.int64)[:, None] * x_stride + source[None, :], mask=mask, other=0)
    if SCALED:
        values = values.to(tl.float32) * tl.load(scale + k, mask=inside, other=0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * out_stride + k[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=(m < M)[:, None] & (k < out_stride)[None, :])


@triton.jit
def _gather_rows_kernel(
    out, x, permutation, scale, M, K, x_stride, out_stride,
    SCALED: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_gather_kernel`, ROWS whole rows one after another: read and written in order, permuted in shared memory."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    k = tl.arange(0, COLUMNS)
    inside = k < K
    source = tl.load(permutation + k, mask=inside, other=0).to(tl.int32)
    if SCALED:
        factor = tl.load(scale + k, mask=inside, other=0).to(tl.float32)
    for r in range(ROWS):
        m = (tl.program_id(0) * ROWS + r).to(tl.int64)
        values = tl.load(x + m * x_stride + k, mask=inside & (m < M), other=0)
        values = tl.where(inside, tl.gather(values, source, 0), 0)
        if SCALED:
            values = values.to(tl.float32) * factor
        tl.store(out + m * out_stride + k, values.to(out.dtype.element_ty), mask=(k < out_stride) & (m < M))


def gather_columns(x: torch.Tensor, packed: PackedWeight, *, scaled: bool = False, multiple: int = 1) -> torch.Tensor:
    """`x[:, permutation]`, or x's copy without a permutation.

    Args:
        x: `[M, K]`.
        packed: the weight whose columns it meets.
        scaled: multiply by the first column scale.
        multiple: the columns of the result are zero-padded to a multiple of this.

    Returns:
        `[M, K']` of x's dtype, contiguous.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    width = triton.cdiv(columns, multiple) * multiple
    out = x.new_empty(tokens, width)
    overlap = overlaps(x.device)
    if tokens >= ROW_TOKENS and packed.permutation is not None and width <= MAX_ROW:
        rows = min(8, triton.cdiv(tokens, 256))
        size = triton.next_power_of_2(width)
        _gather_rows_kernel[(triton.cdiv(tokens, rows),)](
            out,
            x,
            packed.permutation,
            packed.col_scale if scaled else x,
            tokens,
            columns,
            x.stride(0),
            width,
            SCALED=scaled,
            OVERLAP=overlap,
            ROWS=rows,
            COLUMNS=size,
            num_warps=min(max(size // 512, 1), 32),
            **({"launch_pdl": True} if overlap else {}),
        )
        return out
    rows = ROWS if tokens > ROWS else triton.next_power_of_2(tokens)
    _gather_kernel[(triton.cdiv(width, COLUMNS), triton.cdiv(tokens, rows))](
        out,
        x,
        x if packed.permutation is None else packed.permutation,
        packed.col_scale if scaled else x,
        tokens,
        columns,
        x.stride(0),
        width,
        PERMUTED=packed.permutation is not None,
        SCALED=scaled,
        OVERLAP=overlap,
        ROWS=rows,
        COLUMNS=COLUMNS,
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out
