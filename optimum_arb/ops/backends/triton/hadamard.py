"""The block Hadamard transform of an input, its signs and its column order: one launch.

The kernels for up to 16 tokens do it in a launch of theirs instead, see `hadamard_inputs.py`.

A block is multiplied by its matrix on the tensor cores. Numbers of half precision and entries of +1 and -1 are exact in
their format of 19 bits (TF32), float32 is multiplied as it is; sums are float32. The matrix is made in registers, of
the parity of the bits that row and column number share.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import Launch, Launcher, cdiv, overlaps, size_class, tensor_class

# Columns of a matrix product. Blocks of 256 are two of them: a matrix of 256 x 256 does not fit into registers.
HALF = 128
FEW, MANY = 16, 64  # rows of a program; 16 is the least that a product takes


@triton.jit
def _of_chunk(values, rest, WIDTH: tl.constexpr, LOG: tl.constexpr, PRECISION: tl.constexpr):
    """float32 `[rows, WIDTH]`: the unscaled transform of the first `rest` columns, and the width of each one's."""
    i = tl.arange(0, WIDTH)
    begin = tl.zeros([WIDTH], tl.int32) - 1
    width = tl.zeros([WIDTH], tl.int32)
    # what is left over from whole blocks is cut into powers of two, the largest first
    for bit in tl.static_range(LOG + 1):
        start = (rest >> (bit + 1)) << (bit + 1)
        here = (((rest >> bit) & 1) == 1) & (i >= start) & (i < start + (1 << bit))
        begin = tl.where(here, start, begin)
        width = tl.where(here, 1 << bit, width)
    shared = i[:, None] & i[None, :] & (width - 1)[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    matrix = tl.where(begin[:, None] == begin[None, :], 1 - 2 * (shared & 1), 0).to(tl.float32)
    return tl.dot(values, matrix, input_precision=PRECISION), width


@triton.jit
def _load(
    x, permutation, sign, m, k, M, K, x_stride,
    PERMUTED: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    inside = k < K
    source = k
    if PERMUTED:
        source = tl.load(permutation + k, mask=inside, other=0).to(tl.int32)
    mask = (m < M)[:, None] & inside[None, :]
    values = tl.load(x + m.to(tl.int64)[:, None] * x_stride + source[None, :], mask=mask, other=0).to(tl.float32)
    if SIGNED:
        values = values * tl.load(sign + k, mask=inside, other=0).to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=["M"])
def _hadamard_kernel(
    out, x, permutation, sign, M, K, x_stride,
    PERMUTED: tl.constexpr, SIGNED: tl.constexpr, OVERLAP: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m] = Hadamard(sign * x[m, permutation]) of a chunk of WIDTH columns, or of two that make one block."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(0) * WIDTH * (2 if PAIR else 1)
    k = start + tl.arange(0, WIDTH)
    values = _load(x, permutation, sign, m, k, M, K, x_stride, PERMUTED, SIGNED)
    first, width = _of_chunk(values, tl.minimum(K - start, WIDTH), WIDTH, LOG, PRECISION)
    at = out + m.to(tl.int64)[:, None] * K
    rows = (m < M)[:, None]
    if PAIR:
        second_k = k + WIDTH
        values = _load(x, permutation, sign, m, second_k, M, K, x_stride, PERMUTED, SIGNED)
        rest = tl.maximum(tl.minimum(K - start - WIDTH, WIDTH), 0)
        second, second_width = _of_chunk(values, rest, WIDTH, LOG, PRECISION)
        if rest == WIDTH:
            total = first + second
            second = first - second
            first = total
            width = width * 2
            second_width = second_width * 2
        second = second / tl.sqrt(tl.maximum(second_width, 1).to(tl.float32))[None, :]
        tl.store(at + second_k[None, :], second.to(out.dtype.element_ty), mask=rows & (second_k < K)[None, :])
    first = first / tl.sqrt(tl.maximum(width, 1).to(tl.float32))[None, :]
    tl.store(at + k[None, :], first.to(out.dtype.element_ty), mask=rows & (k < K)[None, :])


_hadamard = Launcher(_hadamard_kernel)


def transform(
    x: torch.Tensor,
    permutation: torch.Tensor | None,
    sign: torch.Tensor | None,
    block: int,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """`Hadamard(sign * x[..., permutation])`.

    Args:
        x: `[..., K]`, float16, bfloat16 or float32, on a CUDA device, not empty.
        permutation: `[1, K]`, int16 or int32, or None.
        sign: int8 `[K]`, or None.
        block: 16 to 256 columns, a power of two.
        batch_invariant: compute every row the same way whatever their number.

    Returns:
        `[..., K]` of x's dtype, contiguous.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    tokens, columns = rows.shape
    kind, stride = tensor_class(rows), rows.stride(0)
    made = Transform(
        permutation, sign, block, tokens, columns, stride, kind, x.device, batch_invariant=batch_invariant
    )  # fmt: skip
    return made(rows).view(x.shape)


class Transform:
    """`transform` for a number of tokens, with all but x known.

    Args:
        permutation: see `transform`, and so the others that are not told here.
        sign: see there.
        block: see there.
        tokens: M.
        columns: K.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        device: of all tensors.
        batch_invariant: see there.
    """

    def __init__(
        self,
        permutation: torch.Tensor | None,
        sign: torch.Tensor | None,
        block: int,
        tokens: int,
        columns: int,
        stride: int,
        kind: tuple[torch.dtype, bool],
        device: torch.device,
        *,
        batch_invariant: bool = False,
    ):
        pair = block > HALF
        width = block // 2 if pair else block
        size = FEW if batch_invariant or tokens <= FEW else MANY
        overlap = overlaps(device)
        self.permutation, self.sign = permutation, sign
        self.shape = (tokens, columns)
        self.rest = (
            tokens,
            columns,
            stride,
            permutation is not None,
            sign is not None,
            overlap,
            size,
            width,
            width.bit_length() - 1,
            pair,
            "ieee" if kind[0] == torch.float32 else "tf32",
        )
        key = (
            kind,
            None if permutation is None else tensor_class(permutation),
            None if sign is None else tensor_class(sign),
            columns,
            size_class(stride),
            size,
            block,
        )
        grid = (cdiv(columns, block), cdiv(tokens, size), 1)
        options = {"launch_pdl": True} if overlap else {}
        self.launch = Launch(_hadamard, key, grid, device, num_warps=8, **options)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[M, K]`, contiguous."""
        out = x.new_empty(self.shape)
        self.launch(self.arguments(x, out))
        return out

    def arguments(self, x: Any, out: Any) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them."""
        permutation = x if self.permutation is None else self.permutation
        return out, x, permutation, x if self.sign is None else self.sign, *self.rest
