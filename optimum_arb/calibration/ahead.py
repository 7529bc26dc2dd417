"""The float model's next layer, run by the ranks that wait while others fit the last step of a layer.

With error correction that step often holds one linear, a Llama's down projection, which one rank fits. The float model
looks at nothing that is binarized: so the ranks without a linear run its next layer meanwhile, with their own batches
and with those of the ranks that fit. What the steps of that layer want of it stays on the device, and goes to the rank
that has the batch. The same operations get the same numbers: no bit of the result changes.

    outputs of the float layer   ->  the ranks that wait
    a linear is fitted               they run the next layer: `Made` of each batch
    the rank that has the batch  <-  `Made`

An error of a rank reaches the others where they meet next, as everywhere (`ranks`). Too little memory on a GPU is
none: what was to be run ahead is dropped, and the rank that has the batch runs it in its turn.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from .ahead_plan import Following, Key, Pace, Plan
from .calls import calling
from .ranks import Ranks
from .reading import LAYER_INPUT, Read, Reading, Step
from .sending import Arrival, spread
from .workers import in_order

logger = logging.getLogger(__name__)


@dataclass
class Made:
    """What the float layer made of a batch.

    Attributes:
        reads: number of a step, from 1 -> what it takes of the run, but for the layer's own input.
        output: of the layer; None where nothing wants it.
    """

    reads: dict[int, Read]
    output: torch.Tensor | None

    def is_contiguous(self) -> bool:
        """Tensors in another layout would not arrive in it, and what is multiplied by them may round otherwise."""
        taken = [tensor for read in self.reads.values() for tensor in (read.input, *read.streams.values())]
        return all(tensor is None or tensor.is_contiguous() for tensor in (*taken, self.output))


class _Watch:
    """Seconds between two marks in what a device is asked for."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Here; on a GPU, when it comes to this."""
        if self._stream is None:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append(event)

    def seconds(self) -> float | None:
        """None if it has not begun or not ended."""
        if len(self._marks) < 2:
            return None
        first, last = self._marks[:2]
        if self._stream is None:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class Ahead:
    """The float run of the layer that is binarized next. All ranks call `hand_over`, `collect` and `settle`.

    Args:
        ranks: all of them.
        device: of this rank.
        plan: who does what.
        following: the layer.

    Attributes:
        steps: of the layer, as they are expected.
    """

    def __init__(self, ranks: Ranks, device: torch.device, plan: Plan, following: Following):
        self.steps: list[Step] = plan.steps
        self._ranks = ranks
        self._device = device
        self._plan = plan
        self._following: Following | None = following
        self._inputs: dict[Key, torch.Tensor] = {}
        self._arrivals: dict[Key, Arrival] = {}
        self._made: dict[Key, Made | None] = {}
        self._watch = _Watch(device)
        self._mine: list[Key] = []

    def give(self, batch: int, output: torch.Tensor) -> None:
        """What the float layer before put out for a batch of this rank, which is what the layer receives."""
        if (self._ranks.rank, batch) in self._plan.runners:
            self._inputs[self._ranks.rank, batch] = output.contiguous()

    def hand_over(self) -> None:
        """What was given goes to the ranks that run it."""
        rank, runners = self._ranks.rank, self._plan.runners
        away = {key: self._inputs.pop(key) for key in list(self._inputs) if runners[key] != rank}
        doing = "handing over what the float model puts out"
        mine = {key for key, runner in runners.items() if runner == rank}
        self._arrivals = spread(self._ranks, away, self._device, doing, mine.__contains__, dispensable=True)
        for key in self._arrivals.keys() - mine:
            self._arrivals.pop(key).end()
        self._mine = [key for key in runners if key in mine and (key in self._inputs or key in self._arrivals)]

    def run(self) -> None:
        """This rank's part, before its device comes to a fit or while others fit."""
        assert self._following is not None
        try:
            self._run(self._following)
            return
        except torch.OutOfMemoryError as error:
            logger.info("%s is not run ahead: %s", self._following.name, error)
        for arrival in self._arrivals.values():
            arrival.end()
        self._mine = list(self._made)
        self._watch.mark()
        for held in (self._arrivals, self._inputs, self._made):
            held.clear()
        self._following.layer.to("cpu")  # as much of it as there was room for

    def _run(self, following: Following) -> None:
        # also on ranks that fit: their devices have the inverses to make, while the host has nothing to do
        following.load()
        self._watch.mark()
        if not self._mine:
            return
        for key, arrival in self._arrivals.items():
            arrival.end()
            self._inputs[key] = arrival.take()
        self._arrivals.clear()
        rank, kept = self._ranks.rank, self._plan.kept
        call = calling(following.layer, following.calls, self._device)
        alike = {told: batch for batch, told in reversed(list(enumerate(self._plan.calls[rank])))}
        with ExitStack() as stack:
            readings = {
                # where nothing wants its output, the layer runs up to the last step that takes something of the run
                number: stack.enter_context(
                    Reading(following.layer, following.name, step, whole=following.to_end or number != max(kept))
                )
                for number, step in kept.items()
            }

            def made(key: Key) -> Made | None:
                given = self._inputs.pop(key).clone()  # a layer may write into its input
                batch = key[1] if key[0] == rank else alike[self._plan.calls[key[0]][key[1]]]
                output = None
                with ExitStack() as reading:
                    reads = {number: reading.enter_context(each.reading()) for number, each in readings.items()}
                    output = call(batch, given)
                for read in reads.values():
                    read.streams.pop(LAYER_INPUT, None)
                found = Made(reads, output if following.to_end else None)
                return found if found.is_contiguous() else None

            for key, found in zip(self._mine, in_order(made, self._mine, self._device), strict=True):
                self._made[key] = found
        self._watch.mark()

    def fitted(self) -> None:
        """This rank has fitted its part, if it had any."""
        if not self._mine:
            self._watch.mark()

    def pace(self) -> Pace:
        """What `run` or the fit took; a layer later, when it has ended."""
        seconds = self._watch.seconds()
        if seconds is None or not self._mine:
            return Pace(fit=seconds)
        return Pace(batch=seconds / len(self._mine))

    def collect(self) -> None:
        """What was made goes to the ranks that have the batches."""
        rank = self._ranks.rank
        away = {key: self._made.pop(key) for key in list(self._made) if key[0] != rank}
        doing = "handing back what the float model made"
        self._arrivals = spread(self._ranks, away, self._device, doing, lambda key: key[0] == rank, dispensable=True)
        self._following = None

    def settle(self) -> None:
        """What the others made is there for this device from here on."""
        for key, arrival in self._arrivals.items():
            arrival.end()
            found = arrival.take()
            if key[0] == self._ranks.rank:
                self._made[key] = found
        self._arrivals.clear()

    def has(self, batch: int) -> bool:
        """Whether the layer was run with a batch of this rank, and there is what it made."""
        return self._made.get((self._ranks.rank, batch)) is not None

    def read(self, number: int, batch: int) -> Read:
        """What a step takes of the run, once."""
        made = self._made[self._ranks.rank, batch]
        assert made is not None
        return made.reads.pop(number, Read())

    def output(self, batch: int) -> torch.Tensor:
        """What the layer put out, where that is wanted; nothing of this batch is kept behind that."""
        made = self._made.pop((self._ranks.rank, batch))
        assert made is not None
        assert made.output is not None
        return made.output
