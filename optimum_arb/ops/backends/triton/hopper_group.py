"""All launches of the products of one input by `hopper.py`: what its columns go through once, and each product."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..packed import PackedWeight
from .calls import Entry
from .columns import Gather
from .gemm_config import GemmConfig, columns_read, scales_input
from .hadamard import Transform
from .hopper_product import HopperProduct, converted_scales, gather
from .launch import Ready
from .native_launch import RESULTS, SCRATCH, Slot, X
from .outputs import Outputs, aligned, current_stream, empty_vector
from .ready_launches import ReadyLaunches, versions


class HopperGroup(ReadyLaunches):
    """What the products of up to three weights and one input take, each with a result and a bias of its own.

    Every product is launched as `HopperPlan` does it. Weights with one and the same order of columns have them brought
    into it once. Biases stay where they are, as the weights do.

    Args:
        weights: with the same number of columns.
        biases: `[N]` of each weight, or None.
        tokens: M; x is contiguous and 16-byte aligned.
        dtype: of x and the results, float16 or bfloat16.
        device: of all tensors, the current one.
        splits: programs that share the columns of an output tile, of each weight.
        configs: how else, of each weight.
        transform: what x goes through first; the weights have no column order then. Or None.

    Attributes:
        scratch: bytes that the launches need: what the transform leaves, at `prepared_at` what one product after
            another reads of it, at `parts_at` the parts of their sums.
    """

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        biases: Sequence[torch.Tensor | None],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        splits: Sequence[int],
        configs: Sequence[GemmConfig],
        transform: Transform | None,
    ):
        super().__init__(device)
        self.biases, self.transform = biases, transform
        self._weights, self._configs, self._tokens, self._dtype = weights, configs, tokens, dtype
        columns = weights[0].in_features
        self._outputs = [Outputs(packed.out_features, dtype) for packed in weights]
        self._products = [
            HopperProduct(packed, tokens, columns_read(packed, config), dtype, dtype, bias, device, split_k, config)
            for packed, bias, split_k, config in zip(weights, biases, splits, configs, strict=True)
        ]
        self.prepared_at = 0 if transform is None else aligned(tokens * columns * dtype.itemsize)
        prepared = [
            columns_read(packed, config)
            for packed, config in zip(weights, configs, strict=True)
            if not self._reads_input(packed, config)
        ]
        # what one product reads, and its parts, lie where another's did: a launch begins when the one before ended
        self.parts_at = self.prepared_at + aligned(tokens * max(prepared, default=0) * dtype.itemsize)
        self.scratch = self.parts_at + max(product.scratch for product in self._products)
        self._orders = [packed.permutation for packed in weights if packed.permutation is not None]
        self._find_orders()

    def copied(self) -> list[torch.Tensor]:
        return converted_scales(self._products)

    @staticmethod
    def _reads_input(packed: PackedWeight, config: GemmConfig) -> bool:
        """Whether a product reads x as it is, or as the transform left it."""
        return packed.permutation is None and not scales_input(packed, config)

    def _find_orders(self) -> None:
        """Compares the weights' orders of columns, which waits for the GPU."""
        self._orders_seen = versions(self._orders)
        gathers: list[Gather | None] = []
        before: torch.Tensor | None = None  # the order in which x lies there, not scaled
        for packed, config in zip(self._weights, self._configs, strict=True):
            scaled = scales_input(packed, config)
            if self._reads_input(packed, config) or (not scaled and _same_order(before, packed.permutation)):
                gathers.append(None)
                continue
            kind = (self._dtype, True)
            gathers.append(gather(packed, config, self._tokens, packed.in_features, kind, self.device))
            before = None if scaled else packed.permutation
        self.gathers = gathers
        self.native = None
        self._ran = self._tried = False

    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`[..., K]` to `[..., N]` of each weight, on the current device."""
        if self._orders and versions(self._orders) != self._orders_seen:
            self._find_orders()  # they were written
        native = self.native_now()
        if native is None:
            return self._run_by_triton(x)
        shape = x.shape
        results = [outputs.empty(shape) for outputs in self._outputs]
        size = self.scratch
        scratch = empty_vector(size, torch.uint8) if size else x
        stream = current_stream(self.device.index)
        addresses = [result.data_ptr() for result in results]
        if len(addresses) < 3:
            addresses += [0] * (3 - len(addresses))
        native.run_group(stream, x.data_ptr(), scratch.data_ptr(), *addresses)
        return results

    def entry(self, shape: torch.Size, bias: torch.Tensor | None = None) -> Entry | None:
        """`run` of inputs `[..., K]` of this shape."""
        return self._entry(shape, self._outputs, self._dtype, self.scratch, 0, self._orders)

    def _run_by_triton(self, x: torch.Tensor) -> list[torch.Tensor]:
        shape = x.shape[:-1]
        results = [x.new_empty((*shape, product.rows)) for product in self._products]
        prepared = whole = x if self.transform is None else self.transform(x)
        for i, (product, order) in enumerate(zip(self._products, self.gathers, strict=True)):
            prepared = prepared if order is None else order(whole)
            reads = whole if self._reads_input(self._weights[i], self._configs[i]) else prepared
            product.run(reads, self.biases[i], results[i])
        self._ran = True
        return results

    def ready(self) -> list[Ready | None]:
        found: list[Ready | None] = []
        whole, prepared = Slot(X), Slot(SCRATCH, self.prepared_at)
        if self.transform is not None:
            whole = Slot(SCRATCH)
            found.append(self.transform.launch.ready(self.transform.arguments(Slot(X), whole)))
        for i, (product, order) in enumerate(zip(self._products, self.gathers, strict=True)):
            if order is not None:
                found.append(order.launch.ready(order.arguments(whole, prepared)))
            reads = whole if self._reads_input(self._weights[i], self._configs[i]) else prepared
            found += product.ready(reads, self.biases[i], Slot(RESULTS[i]), Slot(SCRATCH, self.parts_at))
        return found


def _same_order(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether both are the same order of columns; where nothing may wait for the GPU they count as two."""
    if first is None or second is None or torch.cuda.is_current_stream_capturing():
        return False
    return torch.equal(first, second)
