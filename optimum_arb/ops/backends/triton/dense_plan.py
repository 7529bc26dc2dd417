"""A product by way of the dense weight, made ready: the launch that writes it, and the vendor's library."""

from __future__ import annotations

from dataclasses import fields

import torch

from ..packed import PackedWeight
from .dequantize import Dequantize


class DensePlan:
    """`gemm` by "dequantize" for inputs of a dtype, the bits of `gemm`.

    Without it the host looks at every tensor of the weight at each product: prompts of 16 x 64 tokens of a 13B, which
    has four of these a block, took 62 to 95 ms from run to run, and 62 with it (`benchmarks/generate_gpu.py`, H200).

    Args:
        packed: the weight, on a CUDA device, its tensors as `is_ready` wants them.
        dtype: float16, bfloat16 or float32.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype):
        self._transposed = packed.permutation is not None  # which is written faster
        self._dequantize = Dequantize(packed, dtype, transposed=self._transposed)

    @staticmethod
    def is_ready(packed: PackedWeight) -> bool:
        """Whether the launch reads the tensors themselves: copies would not be written with them."""
        tensors = [getattr(packed, field.name) for field in fields(packed)]
        return all(tensor.is_contiguous() for tensor in tensors if isinstance(tensor, torch.Tensor))

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., K]` contiguous to `[..., N]`, on the current device, which has to be the weight's."""
        weight = self._dequantize()
        if self._transposed:
            weight = weight.T
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        # autocast gives it a dtype of its own
        return torch.nn.functional.linear(x, weight, bias).to(x.dtype)
