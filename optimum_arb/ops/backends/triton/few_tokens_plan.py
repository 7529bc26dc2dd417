"""What the plans of `one_bit` and `half_bits` have in common: their launches by one native call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, TypeAlias

import torch

from .launch import Program, Ready, cdiv, hooked
from .native_launch import EXTRA, OUT, SCRATCH, NativeLaunches, Slot, X, prepare
from .outputs import Outputs, current_stream, empty_vector
from .prepack import SLOTS, Prepacked

Grid = tuple[int, int, int]
# permutation, sign and block of `hadamard.transform`, which an input goes through first
Change: TypeAlias = "tuple[torch.Tensor | None, torch.Tensor, int]"


def change_class(change: Change | None) -> Hashable:
    """Equal for transforms that one plan of launches serves: it keeps their tensors."""
    if change is None:
        return None
    permutation, sign, block = change
    return 0 if permutation is None else permutation.data_ptr(), sign.data_ptr(), block


class FewTokensPlan(ABC):
    """Launches of which the first writes the inputs into scratch memory, with all but x and bias known.

    The first run goes through Triton, which compiles; later ones are one native call, where there is one.

    Args:
        x: an input `[M, K]` like all others.
        rows: N, of all parts together.
        scratch: int32 words.

    Attributes:
        launches: the compiled programs of the first two, once they have run.
        contiguous: whether `launch` serves a contiguous input.
    """

    def __init__(self, x: torch.Tensor, rows: int, scratch: int):
        self.tokens, self.device, self.dtype = x.shape[0], x.device, x.dtype
        self.scratch, self.results = scratch, x.shape[0] * rows
        self.launches: tuple[Program, Program] | None = None
        self.contiguous = False
        self._columns = x.shape[1]
        self._outputs = Outputs(rows, x.dtype)
        self._native: NativeLaunches | None = None
        self._stride = -1  # of the input, from row to row, that the native launches are for

    def preparation(self, weight: Prepacked, change: Change | None) -> tuple[tuple[Any, ...], tuple[int, bool, int]]:
        """The tensors that the preparation of inputs reads, and what it is compiled for because of their transform."""
        index = weight.input_scale if weight.index is None else weight.index
        permutation, sign, block = change or (None, weight.input_scale, 1)
        order = sign if permutation is None else permutation
        tile = SLOTS if weight.tiles == cdiv(self._columns, SLOTS) else SLOTS // 2
        constants = (block.bit_length() - 1, permutation is not None, tile)
        return (order, sign, weight.input_scale, index), constants

    @property
    def native(self) -> NativeLaunches | None:
        """The native launches, once they were made."""
        return self._native

    @abstractmethod
    def arguments(
        self, x: Any, stride: int, scratch: Any, bias: Any, experts: Any, out: Any
    ) -> tuple[tuple[Any, ...], ...]:
        """All of each kernel, of tensors or of what stands for them."""

    @abstractmethod
    def grids(self) -> tuple[Grid, Grid]:
        """Programs of the first two kernels."""

    def ready(self, arguments: tuple[tuple[Any, ...], ...]) -> list[Ready | None]:
        """The launches that have run, with what `arguments` gives for them."""
        assert self.launches is not None
        return [
            program.ready(grid, args)
            for program, grid, args in zip(self.launches, self.grids(), arguments[:2], strict=True)
        ]

    def prepare_native(self, stride: int, bias: torch.Tensor | None, experts: torch.Tensor | None) -> None:
        """Makes the native launches, of the programs that a first run has compiled, for inputs of this row stride."""
        assert self.launches is not None
        if bias is not None and experts is not None:
            return  # there is one place for either
        added, owner = None if bias is None else Slot(EXTRA), None if experts is None else Slot(EXTRA)
        both = self.arguments(Slot(X), stride, Slot(SCRATCH), added, owner, Slot(OUT))
        self._native = prepare(self.ready(both), self.device)
        self._stride = stride
        self.contiguous = self._native is not None and (self.tokens == 1 or stride == self._columns)

    def serves(self, x: torch.Tensor) -> bool:
        """Whether `launch` computes for x `[M, K]`, whose rows may be anywhere."""
        return self._native is not None and (self.tokens == 1 or x.stride(0) == self._stride) and not hooked()

    def launch(self, x: torch.Tensor, extra: torch.Tensor | None, shape: torch.Size | None = None) -> torch.Tensor:
        """The native launches, on the current device.

        Args:
            x: which `serves` or `contiguous` speaks of.
            extra: the bias, or the experts of the rows.
            shape: of x, where the result is to be `[..., N]`; else it is `[M * N]`.
        """
        assert self._native is not None
        scratch = empty_vector(self.scratch, torch.int32)
        out = empty_vector(self.results, self.dtype) if shape is None else self._outputs.empty(shape)
        self._native.run(
            current_stream(self.device.index),
            x.data_ptr(),
            out.data_ptr(),
            0 if extra is None else extra.data_ptr(),
            scratch.data_ptr(),
        )
        return out
