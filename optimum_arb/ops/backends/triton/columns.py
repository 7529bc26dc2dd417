"""The input in the order in which a weight's columns are stored."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...streams import finish
from ..packed import PackedWeight
from .launch import Launch, Launcher, cdiv, overlaps, power_of_2, size_class, tensor_class

TILE = tl.constexpr(128)
ROWS, COLUMNS = 8, 512
# From this many tokens on whole rows are permuted in shared memory: single elements gathered from memory move 0.6 TB/s
# on an H200 (2048 x 4096: 53 us, where reading and writing them takes 8).
ROW_TOKENS = 64
MAX_ROW = 2**15  # columns of a row: 64 KiB of shared memory


@triton.jit
def _place(k, plane, PLANES: tl.constexpr):
    """Where column k of this plane's copy of x stands in a row: the copies of 128 columns lie side by side."""
    if PLANES == 1:
        return k
    return (k // TILE * PLANES + plane) * TILE + k % TILE


@triton.jit(do_not_specialize=["M"])
def _gather_kernel(
    out, x, permutation, scale, M, K, x_stride,
    PLANES: tl.constexpr, PERMUTED: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[m, _place(k, plane)] = x[m, permutation[k]] * scale[plane, k]."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    plane = tl.program_id(2)
    inside = k < K
    source = k
    if PERMUTED:
        source = tl.load(permutation + k, mask=inside, other=0).to(tl.int32)
    mask = (m < M)[:, None] & inside[None, :]
    values = tl.load(x + m.to(tl.int64)[:, None] * x_stride + source[None, :], mask=mask, other=0)
    if SCALED:
        values = values.to(tl.float32) * tl.load(scale + plane * K + k, mask=inside, other=0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * (PLANES * K) + _place(k, plane, PLANES)[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gather_rows_kernel(
    out, x, permutation, scale, M, K, x_stride,
    PLANES: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_gather_kernel`, ROWS whole rows one after another: read and written in order, permuted in shared memory."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    k = tl.arange(0, COLUMNS)
    plane = tl.program_id(1)
    inside = k < K
    source = tl.load(permutation + k, mask=inside, other=0).to(tl.int32)
    to = _place(k, plane, PLANES)
    if SCALED:
        factor = tl.load(scale + plane * K + k, mask=inside, other=0).to(tl.float32)
    for r in range(ROWS):
        m = (tl.program_id(0) * ROWS + r).to(tl.int64)
        values = tl.load(x + m * x_stride + k, mask=inside & (m < M), other=0)
        values = tl.gather(values, source, 0)
        if SCALED:
            values = values.to(tl.float32) * factor
        tl.store(out + m * (PLANES * K) + to, values.to(out.dtype.element_ty), mask=inside & (m < M))


_gather = Launcher(_gather_kernel)
_gather_rows = Launcher(_gather_rows_kernel)


def gather_columns(x: torch.Tensor, packed: PackedWeight, *, scaled: bool = False) -> torch.Tensor:
    """`x[:, permutation]`, or x's copy without a permutation.

    Args:
        x: `[M, K]`.
        packed: the weight whose columns it meets.
        scaled: multiply by the column scales, of which each plane has one, contiguous; K is then a multiple of 128
            where there are several planes.

    Returns:
        `[M, K]` of x's dtype, contiguous; where x is scaled `[M, planes * K]`, of every 128 columns each plane's copy.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    return Gather(packed, x.shape[0], x.stride(0), tensor_class(x), x.device, scaled=scaled)(x)


class Gather:
    """`gather_columns` for a number of tokens, with all but x known.

    Args:
        packed: the weight whose columns x meets.
        tokens: M.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        device: of x.
        scaled: see `gather_columns`.

    Attributes:
        shape: of the result.
    """

    def __init__(
        self,
        packed: PackedWeight,
        tokens: int,
        stride: int,
        kind: tuple[torch.dtype, bool],
        device: torch.device,
        *,
        scaled: bool = False,
    ):
        columns = packed.in_features
        permutation = self.permutation = packed.permutation
        scale = self.scale = packed.col_scale if scaled else None
        planes = packed.layout.planes if scaled else 1
        overlap = overlaps(device)
        options = {"launch_pdl": True} if overlap else {}
        self.shape = (tokens, planes * columns)
        self.sizes = (tokens, columns, stride)
        key = (
            kind,
            None if permutation is None else tensor_class(permutation),
            None if scale is None else tensor_class(scale),
            columns,
            size_class(stride),
            planes,
        )
        if tokens >= ROW_TOKENS and permutation is not None and columns <= MAX_ROW:
            # a power of two: every number of rows is compiled anew
            rows = min(8, power_of_2(cdiv(tokens, 256)))
            size = power_of_2(columns)
            grid = (cdiv(tokens, rows), planes, 1)
            warps = min(max(size // 512, 1), 32)
            self.constants: tuple[bool | int, ...] = (planes, scale is not None, overlap, rows, size)
            self.launch = Launch(_gather_rows, (key, rows), grid, device, num_warps=warps, **options)
        else:
            rows = min(ROWS, power_of_2(tokens))
            grid = (cdiv(columns, COLUMNS), cdiv(tokens, rows), planes)
            self.constants = (planes, permutation is not None, scale is not None, overlap, rows, COLUMNS)
            self.launch = Launch(_gather, (key, rows), grid, device, num_warps=4, **options)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self.shape)
        self.launch(self.arguments(x, out))
        return out

    def arguments(self, x: Any, out: Any) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them."""
        permutation = x if self.permutation is None else self.permutation
        return out, x, permutation, x if self.scale is None else self.scale, *self.sizes, *self.constants


# Column scales in another dtype by the identity of the tensor that they were made of, whose end is theirs.
_converted: dict[int, tuple[weakref.ref[torch.Tensor], int, int, torch.Tensor]] = {}


def column_scales(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The column scales `[col_scales, K]` as a vector of this dtype, 16-byte aligned; converted once a tensor.

    Args:
        scale: floating, on a CUDA device.
        dtype: float16 or bfloat16.
    """
    address, version = scale.data_ptr(), 0 if scale.is_inference() else scale._version
    if scale.dtype == dtype and address % 16 == 0 and scale.is_contiguous():
        return scale.view(-1)
    found = _converted.get(id(scale))
    if found is not None:
        reference, of_version, of_address, made = found
        if reference() is scale and (of_version, of_address, made.dtype) == (version, address, dtype):
            return made
    made = scale.detach().to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1)
    # the memory of a CUDA graph is not for what stays
    if scale.is_cuda and not torch.cuda.is_current_stream_capturing():
        finish(scale.device)
        key = id(scale)
        _converted[key] = (weakref.ref(scale, lambda _: _converted.pop(key, None)), version, address, made)
    return made
