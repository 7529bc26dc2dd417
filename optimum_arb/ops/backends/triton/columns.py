"""The input in the order in which a weight's columns are stored."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
MOST = 3  # weights of a launch
MOST_PROGRAMS = 65535  # in a dimension of the grid that is not its first


@triton.jit
def _place(k, plane, PLANES: tl.constexpr):
    """Where column k of this plane's copy of x stands in a row: the copies of 128 columns lie side by side."""
    if PLANES == 1:
        return k
    return (k // TILE * PLANES + plane) * TILE + k % TILE


@triton.jit
def _copy(
    out, x, permutation, scale, M, K, x_stride, plane,
    PLANES: tl.constexpr, PERMUTED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[m, _place(k, plane)] = x[m, permutation[k]] * scale[plane, k] for this program's rows and columns."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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


@triton.jit
def _copy_rows(
    out, x, permutation, scale, M, K, x_stride, plane,
    PLANES: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_copy`, ROWS whole rows one after another: read and written in order, permuted in shared memory."""
    k = tl.arange(0, COLUMNS)
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


@triton.jit(do_not_specialize=["M"])
def _gather_kernel(
    x, out_0, permutation_0, scale_0, out_1, permutation_1, scale_1, out_2, permutation_2, scale_2, M, K, x_stride,
    PLANES_0: tl.constexpr, PERMUTED_0: tl.constexpr, SCALED_0: tl.constexpr,
    PLANES_1: tl.constexpr, PERMUTED_1: tl.constexpr, SCALED_1: tl.constexpr,
    PLANES_2: tl.constexpr, PERMUTED_2: tl.constexpr, SCALED_2: tl.constexpr,
    OVERLAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_copy` for each plane of up to three weights, whose planes follow one another in the grid's last dimension."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    plane = tl.program_id(2)
    if PLANES_1 == 0 or plane < PLANES_0:
        _copy(
            out_0, x, permutation_0, scale_0, M, K, x_stride, plane,
            PLANES_0, PERMUTED_0, SCALED_0, ROWS, COLUMNS,
        )  # fmt: skip
    elif plane < PLANES_0 + PLANES_1:
        _copy(
            out_1, x, permutation_1, scale_1, M, K, x_stride, plane - PLANES_0,
            PLANES_1, PERMUTED_1, SCALED_1, ROWS, COLUMNS,
        )  # fmt: skip
    elif PLANES_2 > 0:
        _copy(
            out_2, x, permutation_2, scale_2, M, K, x_stride, plane - PLANES_0 - PLANES_1,
            PLANES_2, PERMUTED_2, SCALED_2, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _gather_rows_kernel(
    x, out_0, permutation_0, scale_0, out_1, permutation_1, scale_1, out_2, permutation_2, scale_2, M, K, x_stride,
    PLANES_0: tl.constexpr, SCALED_0: tl.constexpr, PLANES_1: tl.constexpr, SCALED_1: tl.constexpr,
    PLANES_2: tl.constexpr, SCALED_2: tl.constexpr,
    OVERLAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_copy_rows` for each plane of up to three weights."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    plane = tl.program_id(1)
    if PLANES_1 == 0 or plane < PLANES_0:
        _copy_rows(out_0, x, permutation_0, scale_0, M, K, x_stride, plane, PLANES_0, SCALED_0, ROWS, COLUMNS)
    elif plane < PLANES_0 + PLANES_1:
        _copy_rows(
            out_1, x, permutation_1, scale_1, M, K, x_stride, plane - PLANES_0, PLANES_1, SCALED_1, ROWS, COLUMNS
        )  # fmt: skip
    elif PLANES_2 > 0:
        _copy_rows(
            out_2, x, permutation_2, scale_2, M, K, x_stride, plane - PLANES_0 - PLANES_1,
            PLANES_2, SCALED_2, ROWS, COLUMNS,
        )  # fmt: skip


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
    return Gather([packed], [scaled], x.shape[0], x.stride(0), tensor_class(x), x.device)(x)[0]


class Gather:
    """`gather_columns` for up to three weights in one launch, for a number of tokens, with all but x known.

    Args:
        weights: whose columns x meets; all with the same number of them.
        scaled: see `gather_columns`, of each weight.
        tokens: M.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        device: of x.

    Attributes:
        shapes: of the results.
    """

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        scaled: Sequence[bool],
        tokens: int,
        stride: int,
        kind: tuple[torch.dtype, bool],
        device: torch.device,
    ):
        columns = weights[0].in_features
        self.permutations = [packed.permutation for packed in weights]
        self.scales = [packed.col_scale if each else None for packed, each in zip(weights, scaled, strict=True)]
        planes = [packed.layout.planes if each else 1 for packed, each in zip(weights, scaled, strict=True)]
        overlap = overlaps(device)
        options = {"launch_pdl": True} if overlap else {}
        self.shapes = [(tokens, count * columns) for count in planes]
        self.sizes = (tokens, columns, stride)
        inputs = [*self.permutations, *self.scales]
        key = (
            kind,
            tuple(None if each is None else tensor_class(each) for each in inputs),
            columns,
            size_class(stride),
            tuple(planes),
        )
        absent = MOST - len(weights)
        permuted = [each is not None for each in self.permutations]
        multiplied = [each is not None for each in self.scales]
        if tokens >= ROW_TOKENS and all(permuted) and columns <= MAX_ROW:
            # a power of two: every number of rows is compiled anew
            rows = min(8, power_of_2(cdiv(tokens, 256)))
            size = power_of_2(columns)
            grid = (cdiv(tokens, rows), sum(planes), 1)
            warps = min(max(size // 512, 1), 32)
            copies = [each for copy in zip(planes, multiplied, strict=True) for each in copy] + [0, False] * absent
            self.constants: tuple[bool | int, ...] = (*copies, overlap, rows, size)
            self.launch = Launch(_gather_rows, (key, rows), grid, device, num_warps=warps, **options)
        else:
            rows = max(min(ROWS, power_of_2(tokens)), power_of_2(cdiv(tokens, MOST_PROGRAMS)))
            grid = (cdiv(columns, COLUMNS), cdiv(tokens, rows), sum(planes))
            each_copy = zip(planes, permuted, multiplied, strict=True)
            copies = [each for copy in each_copy for each in copy] + [0, False, False] * absent
            self.constants = (*copies, overlap, rows, COLUMNS)
            self.launch = Launch(_gather, (key, rows), grid, device, num_warps=4, **options)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        outs = [x.new_empty(shape) for shape in self.shapes]
        self.launch(self.arguments(x, outs))
        return outs

    def arguments(self, x: Any, outs: Sequence[Any]) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them."""
        tensors: list[Any] = []
        for out, permutation, scale in zip(outs, self.permutations, self.scales, strict=True):
            tensors += [out, x if permutation is None else permutation, x if scale is None else scale]
        tensors += [x] * (3 * MOST - len(tensors))
        return x, *tensors, *self.sizes, *self.constants


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
