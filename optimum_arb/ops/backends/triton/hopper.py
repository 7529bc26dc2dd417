"""The fused product on sm_90: a launch of one of `hopper_kernels.py` with what the copy engine has to know."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..packed import PackedWeight
from .columns import column_scales
from .hopper_kernels import FIRST, LAST, SHARED, SPLIT
from .launch import Launch, cdiv, tensor_class

GROUP = 8  # tiles of rows whose programs run side by side, see `hopper_kernels._place`


class Multiply:
    """Fills a result `[M, N]`, or float32 `[split_k, M, N]` with sums that are still to be added.

    Args:
        packed: a weight of `planes-*` layout in tiles of 128 columns, all whole; 16-byte aligned.
        tokens: M.
        stride: from row to row of x.
        x_dtype: float16 or bfloat16.
        out_dtype: of the result.
        bias: `tensor_class` of the bias, only where split_k is 1; None where there is none.
        device: of all tensors.
        block_m: tokens of a program, at most 256.
        block_n: weight rows of a program.
        warps: 4, or 8: two warpgroups and a copying warp.
        stages: slots of the ring.
        tiles: packing tiles of a slot, 1 or 2.
        split_k: programs along K.
        scaled: x is multiplied by the column scales already, `[M, planes * K]` of `columns.Gather`.
        overlapped: start while the launch before this one, which may write x, is still ending.
        after_product: that launch is another product, whose x was there when it began and which neither writes nor
            reads what this one writes; `overlapped` then means to compute beside it.
        out_stride: from token to token of the result.
    """

    def __init__(
        self,
        packed: PackedWeight,
        tokens: int,
        stride: int,
        x_dtype: torch.dtype,
        out_dtype: torch.dtype,
        bias: tuple[torch.dtype, bool] | None,
        device: torch.device,
        *,
        block_m: int,
        block_n: int,
        warps: int,
        stages: int,
        tiles: int,
        split_k: int,
        scaled: bool,
        overlapped: bool,
        after_product: bool,
        out_stride: int,
    ):
        layout = packed.layout
        # a product of scaled x has the planes one after another
        planes, spread = (1, layout.planes) if scaled else (layout.planes, 1)
        rows, columns = packed.out_features, spread * packed.in_features
        with_columns = bool(layout.col_scales) and not scaled
        self.x_box, w_box, self.c_box = _boxes(x_dtype, planes, block_m, block_n, tiles)
        self.x_shape, self.x_strides = (tokens, columns), (stride, 1)
        self.w_desc = _descriptor(packed.weight, *w_box)
        self.col_scale = packed.col_scale if with_columns else None
        self.dtype = x_dtype
        self.row_scale = packed.row_scale
        tiles_per_block = packed.in_features // 128 if packed.block_size == -1 else packed.block_size // 128
        constants = (
            planes,
            spread,
            with_columns,
            layout.row_scales,
            bias is not None,
            (LAST.value if after_product else FIRST.value) if overlapped else 0,
            block_m,
            block_n,
            stages,
            tiles,
            GROUP,
        )
        share = cdiv(cdiv(columns // 128, tiles), split_k) * tiles
        sizes = (rows, columns, out_stride, tiles_per_block)
        self.rest = (tokens, rows, columns, out_stride, self.row_scale.shape[1], tiles_per_block, share, *constants)
        self.launch = Launch(
            SPLIT if warps == 8 else SHARED,
            (x_dtype, out_dtype, bias, tensor_class(self.row_scale), *sizes, constants),
            (cdiv(tokens, block_m) * cdiv(rows, block_n), split_k, 1),
            device,
            num_warps=4,
            launch_pdl=overlapped,
        )

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """x: float16 or bfloat16 `[M, K]` in the weight's stored column order, or as `scaled` says; 16-byte aligned, as
        are its rows."""
        self.launch(self.arguments(x, bias, out))

    def arguments(self, x: Any, bias: Any, out: Any) -> tuple[Any, ...]:
        """All of the kernel's, of tensors or of what stands for them; column scales as they are now."""
        c_desc = self.w_desc
        if self.col_scale is not None:
            c_desc = _descriptor(column_scales(self.col_scale, self.dtype), *self.c_box)
        x_desc = _descriptor(x, *self.x_box, self.x_shape, self.x_strides)
        return x_desc, self.w_desc, c_desc, out, out if bias is None else bias, self.row_scale, *self.rest


_Box = tuple[list[int], gl.NVMMASharedLayout]


@cache
def _boxes(dtype: torch.dtype, planes: int, block_m: int, block_n: int, tiles: int) -> tuple[_Box, _Box, _Box]:
    """What the copy engine brings at a time of x, the weight and the column scales, and how it lies there."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    x_box = [block_m, 128 * tiles]
    # a box is a power of two: three planes come one by one
    w_box = [block_n, 16 if planes == 3 else 16 * planes * tiles]
    return (
        (x_box, gl.NVMMASharedLayout.get_default_for(x_box, kind)),
        (w_box, gl.NVMMASharedLayout(0, 8)),
        ([128], gl.NVMMASharedLayout(0, 16, rank=1)),
    )


def _descriptor(
    tensor: Any,
    box: list[int],
    layout: gl.NVMMASharedLayout,
    shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` without its checks, which take longer than a launch: `gemm` has made them."""
    made = object.__new__(TensorDescriptor)
    made.base = tensor
    made.shape = shape or tensor.shape
    made.strides = strides or tensor.stride()
    made.block_shape = box
    made.layout = layout
    made.padding = "zero"
    return made
