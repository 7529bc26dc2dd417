"""All launches of the products of one input by `hopper.py`: x as each reads it, the products, sums of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..packed import PackedWeight
from .calls import Entry
from .columns import Gather
from .gemm_config import GemmConfig, columns_read, reads_input, scales_input
from .hadamard import Transform
from .hopper_product import HopperProduct, converted_scales, parts_bytes
from .launch import Ready
from .native_launch import RESULTS, Slot, X
from .outputs import Outputs, aligned, current_stream, empty_vector
from .ready_launches import Memory, ReadyLaunches, Step, memory_of, slots, versions
from .sums import Sum

# Bytes up to which what x becomes for all products, or the parts of all sums, lie side by side, so that one launch
# computes them: a launch is 2 us, in which an H200 moves 9 MB, and 16 tokens of a 7B have 0.5 to 6 MiB. Above they use
# one place in turn, which stays in the 50 MB of the L2 cache with the weights that stream by.
TOGETHER = 2**24


class _Copy(NamedTuple):
    """What a product reads.

    Attributes:
        gather: the launch before the product, or None.
        weights: for which of the group's weights this launch makes a copy of x.
        at: where in the scratch memory the product's own lies; None where it reads x.
    """

    gather: Gather | None
    weights: list[int]
    at: int | None


class HopperGroup(ReadyLaunches):
    """What the products of up to three weights and one input take, each with a result and a bias of its own.

    Every product is launched as `HopperPlan` does it, with the same bits. One launch before the first makes all copies
    of x that they read, and one after the last adds all parts, where these do not exceed `TOGETHER`. Weights with one
    and the same order of columns have them brought into it once. Biases stay where they are, as the weights do.

    Launches overlap, and yet each may read what any before it has written, and write where they have read: all programs
    of a launch wait until the one before has ended (`gdc_wait`, `griddepcontrol.wait`) before they touch memory, let
    the next begin, or end. So when a launch ends, all before it have: the second product may read what a gather before
    the first wrote, and another run that is given the same memory begins when this one has ended. Products behind a
    product (`hopper_product.BESIDE`) touch memory before they wait: they begin when all programs of the first have
    waited, so that all before it has ended, and the first's own result and parts lie elsewhere.

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
        scratch: bytes that the launches need: what the transform leaves, what the products read of it, the parts of
            their sums.
        copies: what each product reads, as long as the orders of columns are not written.
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
        choices = list(zip(weights, configs, splits, strict=True))
        copied = [
            0 if reads_input(packed, config) else tokens * columns_read(packed, config) * dtype.itemsize
            for packed, config, _ in choices
        ]
        added = [
            parts_bytes(packed.out_features, tokens, split_k, config.split_from) for packed, config, split_k in choices
        ]
        end = 0 if transform is None else aligned(tokens * columns * dtype.itemsize)
        self._copies_at, end, self._one_gather = _places(copied, end)
        self._parts_at, self.scratch, one_sum = _places(added, end)
        self.products: list[HopperProduct] = []
        for i, (packed, config, split_k) in enumerate(choices):
            # neither a gather nor a sum between
            follows = i > 0 and (self._one_gather or not copied[i]) and (one_sum or not added[i - 1])
            read, bias = columns_read(packed, config), biases[i]
            self.products.append(
                HopperProduct(packed, tokens, read, dtype, dtype, bias, device, split_k, config, follows)
            )
        # by the number of the product that they follow: what they add, each with the number of its product
        self._sums: dict[int, tuple[Sum, list[int]]] = {}
        split = [i for i, product in enumerate(self.products) if product.parts is not None]
        for of in [split] if one_sum and split else [[i] for i in split]:
            parts = [each for i in of if (each := self.products[i].parts) is not None]
            after = len(weights) - 1 if one_sum else of[0]
            self._sums[after] = Sum(parts, tokens, dtype, device), of
        self._orders = [packed.permutation for packed in weights if packed.permutation is not None]
        self._find_orders()

    def copied(self) -> list[torch.Tensor]:
        return converted_scales(self.products)

    def _find_orders(self) -> None:
        """Compares the weights' orders of columns, which waits for the GPU."""
        self._orders_seen = versions(self._orders)
        lying: dict[int, torch.Tensor | None] = {}  # in which order x lies where, not scaled
        made: list[list[int]] = [[] for _ in self._weights]
        reads: list[int | None] = []
        for i, (packed, config) in enumerate(zip(self._weights, self._configs, strict=True)):
            if reads_input(packed, config):
                reads.append(None)
                continue
            scaled, order = scales_input(packed, config), packed.permutation
            same = (at for at, other in lying.items() if _same_order(other, order))
            at = None if scaled else next(same, None)
            if at is None:
                at = self._copies_at[i]
                lying[at] = None if scaled else order
                made[0 if self._one_gather else i].append(i)
            reads.append(at)
        self.copies = [_Copy(self._gather(of), of, at) for of, at in zip(made, reads, strict=True)]
        self.native = None
        self._ran = self._tried = False

    def _gather(self, of: list[int]) -> Gather | None:
        if not of:
            return None
        weights = [self._weights[i] for i in of]
        scaled = [scales_input(self._weights[i], self._configs[i]) for i in of]
        return Gather(weights, scaled, self._tokens, weights[0].in_features, (self._dtype, True), self.device)

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
        results = [x.new_empty((*shape, product.rows)) for product in self.products]
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=x.device)
        for launch, args in self.launches(x, results, memory_of(scratch)):
            launch(args)
        self._ran = True
        return results

    def ready(self) -> list[Ready | None]:
        results = [Slot(RESULTS[i]) for i in range(len(self.products))]
        return [launch.ready(args) for launch, args in self.launches(Slot(X), results, slots)]

    def launches(self, x: Any, results: Sequence[Any], memory: Memory) -> list[Step]:
        """All of them, of tensors or of what stands for them."""
        found: list[Step] = []
        if self.transform is not None:
            whole = memory(0, self._dtype)
            found.append((self.transform.launch, self.transform.arguments(x, whole)))
            x = whole
        added = []
        for i, (product, (gather, of, at)) in enumerate(zip(self.products, self.copies, strict=True)):
            if gather is not None:
                outs = [memory(self._copies_at[j], self._dtype) for j in of]
                found.append((gather.launch, gather.arguments(x, outs)))
            parts = None if product.parts is None else memory(self._parts_at[i], torch.float32)
            reads = x if at is None else memory(at, self._dtype)
            found += product.launches(reads, self.biases[i], results[i], parts)
            added.append(product.added(parts, self.biases[i], results[i]))
            if i in self._sums:
                sums, of = self._sums[i]
                found.append((sums.launch, sums.arguments(*(added[j] for j in of))))
        return found


def _places(sizes: Sequence[int], start: int) -> tuple[list[int], int, bool]:
    """Where tensors of so many bytes begin from this byte on, where the last ends, and whether they lie side by side;
    beyond `TOGETHER` bytes they all begin at the same."""
    if sum(sizes) > TOGETHER:
        return [start] * len(sizes), start + aligned(max(sizes)), False
    places = []
    for size in sizes:
        places.append(start)
        start += aligned(size)
    return places, start, True


def _same_order(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether both are the same order of columns; where nothing may wait for the GPU they count as two."""
    if first is None or second is None or torch.cuda.is_current_stream_capturing():
        return False
    return torch.equal(first, second)
