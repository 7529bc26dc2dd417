"""The launches of one product by `hopper.py`, in order: the input's columns, the product, the sum of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..packed import PackedWeight
from . import hopper
from .columns import Gather, column_scales
from .launch import Ready, hooked, tensor_class
from .native_launch import (
    EXTRA,
    OUT,
    SCRATCH,
    NativeLaunches,
    Outputs,
    Slot,
    X,
    aligned,
    current_stream,
    empty_vector,
    prepare,
)
from .sums import Sum

if TYPE_CHECKING:
    from .gemm import GemmConfig


class HopperPlan:
    """What a product of some weight and number of tokens takes, with all but x and bias known.

    The first run goes through Triton, which compiles; later ones are one native call for all launches, where there is
    one. The weight's tensors are to stay where they are, though they may be written.

    Args:
        packed: the weight.
        tokens: M.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        out_dtype: of the result.
        bias: one like those that are to be added, or None.
        device: of all tensors.
        split_k: programs that share the columns of an output tile.
        config: how else.
    """

    def __init__(
        self,
        packed: PackedWeight,
        tokens: int,
        stride: int,
        kind: tuple[torch.dtype, bool],
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
        device: torch.device,
        split_k: int,
        config: GemmConfig,
    ):
        rows = packed.out_features
        self.rows, self.out_dtype, self.device = rows, out_dtype, device
        self.with_bias = bias is not None
        self.native: NativeLaunches | None = None
        self._ran = self._tried = False
        self._version = -1  # of the column scales that were converted for the native launches
        self._outputs = Outputs(rows, out_dtype)
        self.gather = self.sum = None
        scaled = False
        scratch = 0
        if packed.permutation is not None:
            scaled = packed.layout.planes == 1 and packed.layout.col_scales == 1
            self.gather = Gather(packed, tokens, stride, kind, device, scaled=scaled)
            stride = packed.in_features
            scratch = aligned(tokens * stride * kind[0].itemsize)
        self._parts_at = scratch
        if split_k > 1:
            self.parts = (split_k, tokens, rows)
            self.sum = Sum(split_k, tokens, rows, out_dtype, bias, device)
            scratch += split_k * tokens * rows * 4
        self._scratch = scratch
        self.multiply = hopper.Multiply(
            packed,
            tokens,
            stride,
            kind[0],
            out_dtype if self.sum is None else torch.float32,
            None if bias is None or self.sum is not None else tensor_class(bias),
            device,
            block_m=config.block_m,
            block_n=config.block_n,
            warps=config.warps,
            stages=config.stages,
            tiles=config.tiles,
            split_k=split_k,
            scaled=scaled,
            overlapped=True,
        )

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, on the current device."""
        if self._ran and not self._tried:
            self._prepare_native()
        native = self.native
        if native is None or hooked():
            return self._run_by_triton(x, bias)
        if self._version >= 0 and self._version != self._scale_version():
            self._tried = False  # the column scales were written
            return self._run_by_triton(x, bias)
        out = self._outputs.empty(x.shape)
        size = self._scratch
        scratch = empty_vector(size, torch.uint8) if size else out
        native.run(
            current_stream(self.device.index),
            x.data_ptr(),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            scratch.data_ptr(),
        )
        return out

    def _run_by_triton(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty((*x.shape[:-1], self.rows), dtype=self.out_dtype, device=x.device)
        if self.gather is not None:
            x = self.gather(x)
        if self.sum is None:
            self.multiply(x, bias, out)
        else:
            parts = torch.empty(self.parts, dtype=torch.float32, device=x.device)
            self.multiply(x, None, parts)
            self.sum(parts, bias, out)
        self._ran = True
        return out

    def _scale_version(self) -> int:
        scale = self.multiply.col_scale
        return 0 if scale is None or scale.is_inference() else scale._version

    def _prepare_native(self) -> None:
        """Makes the native launches, of the programs that a first run has compiled."""
        scale = self.multiply.col_scale
        version = -1
        if scale is not None and column_scales(scale, self.multiply.dtype).data_ptr() != scale.data_ptr():
            if torch.cuda.is_current_stream_capturing():
                return  # a copy made now would belong to the graph
            version = self._scale_version()
        bias = Slot(EXTRA) if self.with_bias else None
        x, out = Slot(X), Slot(OUT)
        launches: list[Ready | None] = []
        if self.gather is not None:
            launches.append(self.gather.launch.ready(self.gather.arguments(x, Slot(SCRATCH))))
            x = Slot(SCRATCH)
        if self.sum is None:
            launches.append(self.multiply.launch.ready(self.multiply.arguments(x, bias, out)))
        else:
            parts = Slot(SCRATCH, self._parts_at)
            launches.append(self.multiply.launch.ready(self.multiply.arguments(x, None, parts)))
            launches.append(self.sum.launch.ready(self.sum.arguments(parts, bias, out)))
        # in this order, for another thread that runs meanwhile: new launches with an old version are not used
        self.native = prepare(launches, self.device)
        self._version = version
        self._tried = True
