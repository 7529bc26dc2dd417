"""All launches of a product by `hopper.py`, in order: the input's columns, the product, the sum of its parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..packed import PackedWeight
from .calls import Entry
from .hopper_product import HopperProduct, gather
from .launch import Ready, hooked
from .native_launch import EXTRA, OUT, SCRATCH, NativeLaunches, Slot, X, prepare
from .outputs import Outputs, aligned, current_stream, empty_vector

if TYPE_CHECKING:
    from .gemm_config import GemmConfig


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Changes when one of these is written, as far as torch knows."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class HopperLaunches(ABC):
    """Launches with all but a few addresses known, which run by Triton first, which compiles, then by one native call.

    The weights' tensors are to stay where they are, though they may be written.

    Args:
        device: of all tensors.

    Attributes:
        native: the native launches, once they were made.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.native: NativeLaunches | None = None
        self._ran = self._tried = False
        self._read: list[torch.Tensor] = []  # what copies that the native launches read were made of
        self._versions: list[int] = []

    @abstractmethod
    def products(self) -> Sequence[HopperProduct]:
        """Those of the launches."""

    @abstractmethod
    def ready(self) -> list[Ready | None]:
        """The launches that a first run has compiled, with slots for what changes."""

    def native_now(self) -> NativeLaunches | None:
        """The native launches, where a run is to take them."""
        if self._ran and not self._tried:
            self._prepare_native()
        native = self.native
        if native is None or hooked():
            return None
        if self._read and versions(self._read) != self._versions:
            self._tried = False  # the column scales were written
            return None
        return native

    def _entry(
        self,
        shape: torch.Size,
        outputs: Sequence[Outputs],
        dtype: torch.dtype,
        scratch: int,
        extra: int,
        read: Sequence[torch.Tensor] = (),
    ) -> Entry | None:
        """A run for inputs of this shape as `_calls` takes it; None where there are no native launches."""
        native = self.native_now()
        if native is None:
            return None
        results = tuple(each.arguments(shape) for each in outputs)
        memory = ((scratch,), (1,), torch.uint8) if scratch else None
        counted = [tensor for tensor in [*self._read, *read] if not tensor.is_inference()]
        written = tuple(each for tensor in counted for each in (tensor, tensor._version))
        one = len(outputs) == 1
        return Entry(shape, dtype, self.device.index, native, native.address, extra, results, memory, written, one)

    def _prepare_native(self) -> None:
        found = [product.converted_scale() for product in self.products()]
        read = [scale for scale in found if scale is not None]
        if read and torch.cuda.is_current_stream_capturing():
            return  # a copy made now would belong to the graph
        seen = versions(read)
        # in this order, for another thread that runs meanwhile: new launches with an old version are not used
        self.native = prepare(self.ready(), self.device)
        self._read, self._versions = read, seen
        self._tried = True


class HopperPlan(HopperLaunches):
    """What a product of some weight and number of tokens takes, with all but x and bias known.

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
        super().__init__(device)
        self.dtype, self.out_dtype, self.with_bias = kind[0], out_dtype, bias is not None
        self._outputs = Outputs(packed.out_features, out_dtype)
        self.gather = gather(packed, tokens, stride, kind, device)
        self.parts_at = 0
        if self.gather is not None:
            stride = packed.in_features
            self.parts_at = aligned(tokens * stride * kind[0].itemsize)
        self.product = HopperProduct(packed, tokens, stride, kind[0], out_dtype, bias, device, split_k, config)
        self.scratch = self.parts_at + self.product.scratch

    def products(self) -> Sequence[HopperProduct]:
        return [self.product]

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, on the current device."""
        native = self.native_now()
        if native is None:
            return self._run_by_triton(x, bias)
        out = self._outputs.empty(x.shape)
        size = self.scratch
        scratch = empty_vector(size, torch.uint8) if size else out
        native.run(
            current_stream(self.device.index),
            x.data_ptr(),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            scratch.data_ptr(),
        )
        return out

    def entry(self, shape: torch.Size, bias: torch.Tensor | None) -> Entry | None:
        """`run` of inputs `[..., K]` of this shape with this bias, contiguous and 16-byte aligned."""
        extra = 0 if bias is None else bias.data_ptr()
        return self._entry(shape, [self._outputs], self.dtype, self.scratch, extra)

    def _run_by_triton(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty((*x.shape[:-1], self.product.rows), dtype=self.out_dtype, device=x.device)
        if self.gather is not None:
            x = self.gather(x)
        self.product.run(x, bias, out)
        self._ran = True
        return out

    def ready(self) -> list[Ready | None]:
        bias = Slot(EXTRA) if self.with_bias else None
        parts = Slot(SCRATCH, self.parts_at)
        if self.gather is None:
            return self.product.ready(Slot(X), bias, Slot(OUT), parts)
        gathered = self.gather.launch.ready(self.gather.arguments(Slot(X), Slot(SCRATCH)))
        return [gathered, *self.product.ready(Slot(SCRATCH), bias, Slot(OUT), parts)]
