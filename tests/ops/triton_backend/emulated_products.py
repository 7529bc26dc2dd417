"""Products of `hopper.py` computed by torch: Triton's interpreter does not take kernels in Gluon.

What is launched around them, and where it all lies in memory, is what a GPU has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from packed_weights import random_packed

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import hopper


class _EmulatedLaunch:
    """What `launch.Launch` is without a GPU: nothing can be launched natively."""

    def __init__(self, run: Callable[[tuple[Any, ...]], None]):
        self._run = run

    def __call__(self, args: tuple[Any, ...]) -> None:
        self._run(args)

    def ready(self, args: tuple[Any, ...]) -> None:
        return None


class EmulatedMultiply(hopper.Multiply):
    """Reads and writes what the kernel does."""

    def __init__(self, packed: PackedWeight, *args: Any, split_k: int, scaled: bool, out_stride: int, **choices: Any):
        super().__init__(packed, *args, split_k=split_k, scaled=scaled, out_stride=out_stride, **choices)
        self.after_product = choices["after_product"]
        self._stored, self._split_k, self._out_stride = _stored(packed, scaled), split_k, out_stride
        self._bias, self._share = args[4], self.rest[6] * 128
        self.launch = _EmulatedLaunch(self._multiply)

    def _multiply(self, args: tuple[Any, ...]) -> None:
        x_desc, _, _, out, bias, *_ = args
        tokens, rows = self.x_shape[0], len(self._stored)
        x = x_desc.base.as_strided(self.x_shape, self.x_strides, x_desc.base.storage_offset()).float()
        for part in range(self._split_k):
            of = slice(part * self._share, (part + 1) * self._share)
            found = x[:, of] @ self._stored[:, of].T
            if self._bias is not None:
                found += bias.as_strided((rows,), (1,), bias.storage_offset()).float()
            first = out.storage_offset() + part * tokens * self._out_stride
            out.as_strided((tokens, rows), (self._out_stride, 1), first).copy_(found)


def _stored(packed: PackedWeight, scaled: bool) -> torch.Tensor:
    """float32 `[N, K]` in the order of the stored columns; where x comes scaled `[N, planes * K]`, the planes of a tile
    side by side, without the column scales."""
    rows, columns, planes = packed.out_features, packed.in_features, packed.layout.planes
    if not scaled:
        dense = packed.unpack().dequantize(torch.float32)
        return dense if packed.permutation is None else dense[:, packed.permutation[0].long()]
    tile = torch.arange(columns // 128 * planes)
    tiles_per_block = columns // 128 if packed.block_size == -1 else packed.block_size // 128
    one = random_packed(planes_layout(1), rows, planes * columns)
    one.weight = packed.weight
    one.row_scale = packed.row_scale[:, tile // planes // tiles_per_block * planes + tile % planes]
    return one.unpack().dequantize(torch.float32)
