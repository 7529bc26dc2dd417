"""Adds what programs that share the columns of an output tile have computed of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import Launch, Launcher, cdiv, overlaps, tensor_class


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    out,
    parts,
    bias,
    M,
    N,
    stride,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = parts[0, i] + parts[1, i] + ... + bias[i mod N], in this order.

    Rows of out are `stride` apart, N where it is WHOLE.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    # the compiler knows what N is divisible by, and so the size
    size = M.to(tl.int64) * N
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(parts + i, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + part * size + i, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias + i % N, mask=inside, other=0).to(tl.float32)
    to = i if WHOLE else i // N * stride + i % N
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


_sum = Launcher(_sum_kernel)


class Sum:
    """Adds `parts` float32 `[split_k, M, N]` and a bias into a result `[M, N]`, always in the same order.

    Args:
        split_k: see above.
        tokens: M.
        rows: N.
        dtype: of the result.
        bias: one like those that are to be added, or None.
        device: of all tensors.
        stride: from token to token of the result; N where None.
    """

    def __init__(
        self,
        split_k: int,
        tokens: int,
        rows: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        device: torch.device,
        stride: int | None = None,
    ):
        stride = rows if stride is None else stride
        overlap = overlaps(device)
        block = 1024 if tokens * rows >= 2**18 else 256
        self.rest = (tokens, rows, stride, split_k, bias is not None, overlap, stride == rows, block)
        self.launch = Launch(
            _sum,
            (dtype, None if bias is None else tensor_class(bias), rows, stride, split_k, block),
            (cdiv(tokens * rows, block), 1, 1),
            device,
            num_warps=block // 256,
            **({"launch_pdl": True} if overlap else {}),
        )

    def __call__(self, parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        self.launch(self.arguments(parts, bias, out))

    def arguments(self, parts: Any, bias: Any, out: Any) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them."""
        return out, parts, parts if bias is None else bias, *self.rest
