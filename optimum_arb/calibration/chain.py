"""A chain of layers in calibration: each runs by itself, on what the binarized ones before it put out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .activations import INPUTS, Activations, EveryOther
from .ahead import Ahead
from .ahead_plan import Following
from .calls import Call, layer_runs
from .experts import LayerStatistics, Taken
from .fitting import Fitting
from .layers import Layers
from .progress import Progress
from .ranks import Ranks
from .runs import ModelRuns
from .steps import Steps
from .to_device import ToDevice
from .turn import AfterLayer, LayerTurn
from .weights import LayerWeights
from .workers import in_order, one_thread


@dataclass
class ChainWalk:
    """What `CalibrationWalk` does with layers that form a chain; arguments as there.

    Attributes:
        runs: of the model.
        fitting: binarizes modules.
        batches: of all ranks.
        fitted: how many batches of this rank something may be fitted to.
        float_outputs: with `follow_float`, what comes out of the float model's last layer, batch by batch, once the
            walk is over.
    """

    model: nn.Module
    runs: ModelRuns
    fitting: Fitting
    batches: Sequence[torch.Tensor | Mapping[str, Any]]
    fitted: int
    device: torch.device
    weights: LayerWeights
    activations: Activations
    progress: Progress
    ranks: Ranks
    after_layer: AfterLayer | None
    follow_float: bool
    error_correction: float
    keeps_float: bool
    float_outputs: list[torch.Tensor] = field(default_factory=list, init=False)
    _ahead: Ahead | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._to_device = ToDevice(self.weights, self.device)

    def run(self, group: Layers, before: list[str]) -> None:
        """Binarizes a chain of layers.

        Args:
            group: the layers.
            before: names of those that run in the model before they do.
        """
        if all(self.weights.is_finished(name) for name in group.names):
            for name in group.names:
                self.progress.already_done(name)
            return
        with self.weights.whole(before):
            calls = self._record(group)
        hidden = self.activations
        finished = [self.weights.is_finished(name) for name in group.names]
        done = next(index for index, found in enumerate(finished) if not found)
        # what an interrupted run finished need not run again if its outputs were kept
        start = done if done and hidden.restore(group.names[done - 1]) else 0
        for index, (name, names) in enumerate(zip(group.names, group.targets, strict=True)):
            if index < start:
                self.progress.already_done(name)
                continue
            with self.progress.layer(name, [] if finished[index] else names):
                following = self._following(group, index + 1, finished, hidden, calls)
                self._turn(group, index, finished[index], hidden, calls[index], following)
            calls[index].clear()
        hidden.clear()

    def _record(self, group: Layers) -> list[list[Call]]:
        """Keeps the hidden states that enter the first layer; each layer's other arguments, batch by batch."""
        self.activations.clear()

        def put(batch: int, hidden: torch.Tensor) -> None:
            if not self.follow_float:
                self.activations.put(batch, hidden)
                return
            self.activations.put(2 * batch, hidden)
            self.activations.put(2 * batch + 1, self.activations[2 * batch] if self.activations.in_memory else hidden)

        # on the CPU wherever layers run: 32 threads took 140 ms a batch of a 7B where others were at work, one takes 20
        with one_thread(torch.device("cpu")):
            calls = self.runs.record(group, self.ranks.batches(self.batches), put)
        self.activations.advance(INPUTS)
        return calls

    def _following(
        self, group: Layers, index: int, finished: list[bool], hidden: Activations, calls: list[list[Call]]
    ) -> Following | None:
        """The layer of this number, where it may be run ahead: float, its hidden states in memory."""
        if index >= len(group.names) or finished[index] or not group.targets[index] or not hidden.in_memory:
            return None
        name, layer = group.names[index], group.modules[index]
        to_end = index + 1 < len(group.names) or self.keeps_float
        # up to a step of the last layer, what is held out runs in the binarized form alone
        needed = calls[index] if to_end else calls[index][: max(0, self.fitted)]
        load = partial(self._to_device.bring_beside, name, layer)
        return Following(name, layer, group.targets[index], needed, to_end, load)

    def _turn(
        self,
        group: Layers,
        index: int,
        finished: bool,
        hidden: Activations,
        calls: list[Call],
        following: Following | None,
    ) -> None:
        """One layer: its calibration matrices, its binarized form, its outputs."""
        name, layer, names = group.names[index], group.modules[index], group.targets[index]
        self._to_device.bring(name, layer)
        inputs = EveryOther(hidden) if self.follow_float else hidden
        references: list[torch.Tensor] = []
        work = bool(names) and not finished
        on = index + 1 < len(group.modules)
        keep = self.after_layer is not None or not on  # the float layer's outputs, in memory

        def take(batch: int, output: torch.Tensor) -> None:
            if keep:
                references.append(output.to("cpu"))
            else:
                hidden.put(2 * batch, output)

        wanted = on or self.keeps_float
        steps: Steps | None = None
        try:
            if self.follow_float and wanted and not (work and self.error_correction):
                with self.weights.in_float(name, layer) as of_float:
                    of_float.to(self.device)
                    run = layer_runs(of_float, EveryOther(hidden, 0), calls, self.device)
                    for batch, output in enumerate(in_order(run, range(len(calls)), self.device)):
                        take(batch, output)
                    if of_float is not layer:
                        of_float.to("cpu")
            if work:
                modules = {target: self.model.get_submodule(target) for target in names}
                if self.error_correction:
                    kept = self.after_layer is not None
                    once_more = on and not kept
                    ahead, self._ahead = self._ahead, None  # what the steps have used of it is let go of there
                    steps = Steps(self.fitting, self.ranks, self.device, self.fitted, kept, once_more, following, ahead)
                    del ahead
                    found = steps.binarize(name, layer, modules, hidden, calls, take if wanted else None)
                    self._ahead = steps.ahead
                else:
                    kept = self.after_layer is not None and not self.follow_float
                    found = self._binarize_at_once(layer, modules, inputs, calls, references if kept else None)
                if self.after_layer is not None:
                    fitted, statistics = found
                    turn = LayerTurn(
                        name, layer, names, self.device, inputs, references, calls, fitted, statistics, self.fitted
                    )
                    self.after_layer(turn)
                    del turn, fitted, statistics
                del found, modules
            if on:
                plain = nullcontext(layer_runs(layer, inputs, calls, self.device))
                with plain if steps is None else steps.outputs(layer, hidden, calls) as run:
                    for batch, output in enumerate(in_order(run, range(len(calls)), self.device)):
                        if self.follow_float and keep:
                            hidden.put(2 * batch, references[batch])
                        hidden.put(2 * batch + 1 if self.follow_float else batch, output)
                hidden.advance(name)
            elif self.follow_float:
                self.float_outputs = references
        finally:
            layer.to("cpu")
        if finished:
            self.weights.release(name)
        else:
            self.weights.finish(name)

    def _binarize_at_once(
        self,
        layer: nn.Module,
        modules: dict[str, nn.Module],
        inputs: Activations,
        calls: list[Call],
        outputs: list[torch.Tensor] | None,
    ) -> tuple[dict[str, nn.Module], LayerStatistics]:
        """All modules of a layer, on the inputs that they get while it is float; its outputs go into `outputs`.

        Returns:
            the modules, and their statistics.
        """
        with LayerStatistics(modules) as statistics:
            run = layer_runs(layer, inputs, calls, self.device)

            def taken(batch: int) -> tuple[torch.Tensor, Taken]:
                with statistics.taking() as found:
                    output = run(batch)
                statistics.multiply(found)
                return output, found

            for batch, (output, found) in enumerate(in_order(taken, range(len(calls)), self.device)):
                statistics.hold_out(batch >= self.fitted)
                statistics.add(found)
                if outputs is not None:
                    outputs.append(output.to("cpu"))
                del output, found
        return self.fitting.binarize(list(modules), statistics, self.after_layer is not None), statistics
