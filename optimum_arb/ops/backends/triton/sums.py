"""Adds what programs that share the columns of an output tile have computed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import Launch, Launcher, cdiv, overlaps, tensor_class

MOST = 3  # results of a launch


@triton.jit
def _add(
    out, parts, bias, M, N, stride, block,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = parts[0, i] + parts[1, i] + ... + bias[i mod N], in this order, for i of this block.

    Rows of out are `stride` apart, N where it is WHOLE.
    """
    # the compiler knows what N is divisible by, and so the size
    size = M.to(tl.int64) * N
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(parts + i, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + part * size + i, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias + i % N, mask=inside, other=0).to(tl.float32)
    to = i if WHOLE else i // N * stride + i % N
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    M,
    out_0, parts_0, bias_0, N_0, stride_0, out_1, parts_1, bias_1, N_1, stride_1,
    out_2, parts_2, bias_2, N_2, stride_2,
    SPLIT_0: tl.constexpr, HAS_BIAS_0: tl.constexpr, WHOLE_0: tl.constexpr,
    SPLIT_1: tl.constexpr, HAS_BIAS_1: tl.constexpr, WHOLE_1: tl.constexpr,
    SPLIT_2: tl.constexpr, HAS_BIAS_2: tl.constexpr, WHOLE_2: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_add` for up to three results, whose blocks follow one another."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    if SPLIT_1 == 0:
        _add(out_0, parts_0, bias_0, M, N_0, stride_0, block, SPLIT_0, HAS_BIAS_0, WHOLE_0, BLOCK)
    else:
        second = tl.cdiv(M.to(tl.int64) * N_0, BLOCK).to(tl.int32)
        third = second + tl.cdiv(M.to(tl.int64) * N_1, BLOCK).to(tl.int32)
        if block < second:
            _add(out_0, parts_0, bias_0, M, N_0, stride_0, block, SPLIT_0, HAS_BIAS_0, WHOLE_0, BLOCK)
        elif block < third:
            _add(out_1, parts_1, bias_1, M, N_1, stride_1, block - second, SPLIT_1, HAS_BIAS_1, WHOLE_1, BLOCK)
        elif SPLIT_2 > 0:
            _add(out_2, parts_2, bias_2, M, N_2, stride_2, block - third, SPLIT_2, HAS_BIAS_2, WHOLE_2, BLOCK)


_sum = Launcher(_sum_kernel)


class Parts(NamedTuple):
    """Of what a result `[M, N]` is added.

    Attributes:
        split_k: parts.
        rows: N.
        bias: one like those that are to be added, or None.
        stride: from token to token of the result; N where None.
    """

    split_k: int
    rows: int
    bias: torch.Tensor | None = None
    stride: int | None = None


class Sum:
    """Adds float32 `[split_k, M, N]` and a bias into a result `[M, N]`, always in the same order; up to three of them.

    Args:
        results: see above.
        tokens: M.
        dtype: of the results.
        device: of all tensors.
    """

    def __init__(self, results: Sequence[Parts], tokens: int, dtype: torch.dtype, device: torch.device):
        overlap = overlaps(device)
        block = 1024 if tokens * max(each.rows for each in results) >= 2**18 else 256
        self._tokens = tokens
        self._sizes = [(each.rows, each.rows if each.stride is None else each.stride) for each in results]
        cuts: list[tuple[int, bool, bool]] = []
        for each, (rows, stride) in zip(results, self._sizes, strict=True):
            cuts.append((each.split_k, each.bias is not None, rows == stride))
        cuts += [(0, False, False)] * (MOST - len(cuts))
        self._constants = (*(value for cut in cuts for value in cut), overlap, block)
        biases = tuple(None if each.bias is None else tensor_class(each.bias) for each in results)
        self.launch = Launch(
            _sum,
            (dtype, biases, tuple(self._sizes), tuple(cuts), block),
            (sum(cdiv(tokens * each.rows, block) for each in results), 1, 1),
            device,
            num_warps=block // 256,
            **({"launch_pdl": True} if overlap else {}),
        )

    def __call__(self, *added: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]) -> None:
        """Parts, bias and result of each."""
        self.launch(self.arguments(*added))

    def arguments(self, *added: tuple[Any, Any, Any]) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them."""
        found: list[Any] = []
        for (parts, bias, out), sizes in zip(added, self._sizes, strict=True):
            found += [out, parts, parts if bias is None else bias, *sizes]
        found += found[:5] * (MOST - len(added))
        return self._tokens, *found, *self._constants
