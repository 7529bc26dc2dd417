"""Which tokens reach which expert in calibration, and the calibration matrices that follow from them.

The experts' inputs `[T, H]` are kept on the CPU, in their own dtype, with the experts that each token was routed to.
What an expert needs is made from them when its turn comes: its inputs are its rows, the inputs of its `down_proj` are
computed from those with its float weights, and there are never the matrices of more than one expert. (Those of all
experts of a layer at once would be 52 GB for DeepSeek-V3: 256 of 7168 x 7168 in float32. The inputs are 3.8 GB for
128 x 2048 tokens, as much as the walk holds between two layers.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..experts.matrices import is_experts
from .correction import Corrections
from .statistics import InputStatistics

# Rows of an expert's inputs that go to the device at once: 256 MiB of float32 at 8192 features.
ROWS = 8192


class RoutedInputs:
    """The inputs of an experts module and where they were routed.

    Attributes:
        experts: E.
    """

    def __init__(self, experts: int):
        self.experts = experts
        self._inputs: list[torch.Tensor] = []
        self._index: list[torch.Tensor] = []
        self._sorted: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None

    def add(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> None:
        """Keeps the inputs `[T, H]` of one run and the experts `[T, k]` of each."""
        # a copy: what follows in the model may write into the tensor
        self._inputs.append(hidden_states.detach().flatten(0, -2).to("cpu", copy=True))
        self._index.append(top_k_index.detach().flatten(0, -2).to("cpu", copy=True))
        self._sorted = None

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All inputs `[T, H]` in the order in which they came, and their experts `[T, k]`; None without any."""
        return (torch.cat(self._inputs), torch.cat(self._index)) if self._inputs else None

    def tokens(self) -> list[int]:
        """How many inputs were routed to each expert."""
        if not self._inputs:
            return [0] * self.experts
        ends = self._by_expert()[2]
        return [stop - start for start, stop in zip([0, *ends], ends, strict=False)]

    def rows(self, expert: int) -> torch.Tensor:
        """The inputs `[n, H]` of one expert, on the CPU, in the order in which they came."""
        inputs, tokens, ends = self._by_expert()
        start = ends[expert - 1] if expert else 0
        return inputs[tokens[start : ends[expert]]]

    def _by_expert(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """All inputs, the numbers of those that each expert got one after the other, and where each expert's end."""
        if self._sorted is None:
            inputs, index = torch.cat(self._inputs), torch.cat(self._index)
            self._inputs, self._index = [inputs], [index]
            experts, order = torch.sort(index.reshape(-1), stable=True)
            numbers = torch.arange(self.experts, dtype=experts.dtype)
            ends = torch.searchsorted(experts, numbers, right=True)
            self._sorted = inputs, order // index.shape[1], ends.tolist()
        return self._sorted


@dataclass
class Taken:
    """What one run of the model handed to linears and experts: `routed` has the experts' name, inputs and indices."""

    inputs: list[Any]
    routed: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)


class LayerStatistics:
    """What the modules of a layer receive while the model runs inside this context: linears and experts.

    Args:
        modules: name -> float linear, or float experts.

    Attributes:
        corrections: with error correction, what the linears have to make up for.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = {name: module for name, module in modules.items() if is_experts(module)}
        self.linears = InputStatistics({name: m for name, m in modules.items() if name not in self._modules})
        self.experts, self.held_out_experts = (
            {name: RoutedInputs(int(module.num_experts)) for name, module in self._modules.items()}  # type: ignore[arg-type]
            for _ in range(2)
        )
        self.corrections: Corrections | None = None
        self._handles: list = []
        self._taking = threading.local()

    def __enter__(self) -> LayerStatistics:
        self.linears.__enter__()
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.linears.__exit__(*exception)

    def end_batch(self) -> None:
        self.linears.end_batch()

    @contextmanager
    def taking(self) -> Iterator[Taken]:
        """As `InputStatistics.taking`."""
        with self.linears.taking() as inputs:
            taken = Taken(inputs)
            self._taking.taken = taken
            try:
                yield taken
            finally:
                del self._taking.taken

    def multiply(self, taken: Taken) -> None:
        """As `InputStatistics.multiply`."""
        self.linears.multiply(taken.inputs)

    def add(self, taken: Taken) -> None:
        """Sums, or keeps, what one run took down."""
        for name, hidden_states, top_k_index in taken.routed:
            self._route(name, hidden_states, top_k_index)
        self.linears.add(taken.inputs)

    def _route(self, name: str, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> None:
        routed = self.held_out_experts if self.linears.holding_out else self.experts
        routed[name].add(hidden_states, top_k_index)

    def absorb(self, other: LayerStatistics) -> None:
        """Adds what another one has of other modules."""
        self.linears.absorb(other.linears)
        self.experts |= other.experts
        self.held_out_experts |= other.held_out_experts

    def device(self) -> torch.device:
        """Where the modules are."""
        return next(p.device for m in (*self.linears.modules(), *self._modules.values()) for p in m.parameters())

    def hold_out(self, holding_out: bool) -> None:
        """Whether what comes is held out: kept apart, to measure errors on inputs that nothing is fitted to."""
        self.linears.holding_out = holding_out

    def _hook(self, name: str):
        def gather(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = [*args, *(kwargs[key] for key in ("hidden_states", "top_k_index")[len(args) :])]
            taken = getattr(self._taking, "taken", None)
            if taken is None:
                self._route(name, given[0], given[1])
            else:
                taken.routed.append((name, given[0].detach().clone(), given[1].detach().clone()))

        return gather
