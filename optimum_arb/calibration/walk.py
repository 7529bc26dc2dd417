"""The walk over a model's layers in calibration: each layer's inputs come from the layers binarized before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import ARBConfig
from .activations import INPUTS, Activations, EveryOther
from .ahead import Ahead
from .ahead_plan import Following
from .calls import Call, Stop, layer_runs
from .distributed import Ranks
from .experts import LayerStatistics, Taken
from .fitting import Binarize, BinarizeExperts, Fitting, Measure
from .layers import Layers, find_layers, no_one_chain
from .progress import Progress
from .runs import ModelRuns
from .steps import Steps
from .to_device import ToDevice
from .turn import AfterLayer, LayerTurn
from .weights import OUTSIDE, LayerWeights
from .workers import in_order, one_thread


class CalibrationWalk:
    """Binarizes the linears of a model in the order in which they run.

    Layers are the items of the outermost `ModuleList`s that hold such linears. Where they form a chain, one run of the
    model in which every layer hands on its input records what else each layer is called with; then layer after layer
    runs by itself: once to gather the calibration matrices, once more, binarized, for the inputs of the next. Layers of
    any other form cost a run of the model each. Linears outside the layers come last.

    Args:
        model: the float model, on the CPU, in evaluation mode.
        targets: names of the linears, and of the modules of experts, to binarize.
        binarize: makes the binarized module of a linear.
        batches: token ids int64 `[B, L]`, or other inputs of the model's `forward` by their names; none to binarize
            from the weights alone.
        device: where a layer runs and is binarized; its weights go there and come back.
        binarize_experts: makes the binarized module of experts; needed where there are any.
        weights: where the model's weights are; in memory unless given.
        activations: keeps the hidden states between two layers; in memory unless given.
        after_layer: is called with each layer of a chain once it is binarized, before its outputs are computed for the
            next. It costs the memory of the float layer's outputs. Gradients are off; it may turn them on.
        follow_float: keep the hidden states of the float model beside those of the one that is binarized, at the cost
            of another run of each layer; a model whose layers form no chain, or more than one, is refused.
        error_correction: strength with which each linear is fitted to make up for the errors made before it
            (`calibration/correction.py`), 0 for none. It follows the float model. Where the layers form no chain, or
            more than one, it is set to 0, or refused if it `must_correct`.
        must_correct: see above.
        progress: is told of layers and linears; a bar or lines on stderr unless given.
        ranks: the processes that do this together; this one alone unless given.
        records: what `binarize` notes of the linears by their names; other ranks' notes are added.
        held_out: how many batches, the last ones, nothing is fitted to.
        measure: is called with each module and its binarized form, and with the statistics, where what was held out
            is apart.
        choices: name of a linear -> what `binarize` fits it by; of those that are in it, several ranks divide more than
            whole linears.

    Raises:
        ValueError: `after_layer` is given and there are several ranks, of which each has a part of the batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[str],
        binarize: Binarize,
        batches: Sequence[torch.Tensor | Mapping[str, Any]],
        device: torch.device | str = "cpu",
        binarize_experts: BinarizeExperts | None = None,
        *,
        weights: LayerWeights | None = None,
        activations: Activations | None = None,
        after_layer: AfterLayer | None = None,
        follow_float: bool = False,
        error_correction: float = 0.0,
        must_correct: bool = False,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
        records: dict[str, Any] | None = None,
        held_out: int = 0,
        measure: Measure | None = None,
        choices: Mapping[str, ARBConfig] | None = None,
    ):
        self.model = model
        self.ranks = ranks or Ranks()
        if after_layer is not None and self.ranks.size > 1:
            raise ValueError("Scales cannot be tuned by a layer's output on several ranks: start one process.")
        self.fitted = len(batches) - held_out - self.ranks.first_batch(len(batches))  # of this rank's
        self.batches = batches
        self.device = torch.device(device)
        self.weights = weights or LayerWeights()
        self.activations = Activations(self.device) if activations is None else activations  # an empty one is false
        self.after_layer = after_layer
        self.follow_float = follow_float
        self.error_correction = error_correction
        self._must_correct = must_correct
        self._keeps_float = follow_float or after_layer is not None  # what the float model's last layer puts out
        # with `follow_float`, what comes out of the float model's last layer, batch by batch, once the walk is over
        self.float_outputs: list[torch.Tensor] = []
        self.chain: Layers | None = None  # with `follow_float`, the layers
        self.progress = progress or Progress()
        self.runs = ModelRuns(model, self.weights)
        self._to_device = ToDevice(self.weights, self.device)
        self._ahead: Ahead | None = None
        noted = {} if records is None else records
        self.fitting = Fitting(
            model,
            binarize,
            binarize_experts,
            self.device,
            self.progress,
            self.ranks,
            noted,
            measure,
            choices or {},
        )
        self.errors = self.fitting.errors
        self._targets = list(targets)

    @torch.no_grad()
    def run(self) -> None:
        """Replaces every target by its binarized module.

        Raises:
            ValueError: NaN or Inf in a weight or in the activations that reach a module, which it names.
        """
        with torch.autocast(self.device.type, enabled=False):
            groups = find_layers(self.model, self._targets)
            inside = {name for group in groups for names in group.targets for name in names}
            outside = [name for name in self._targets if name not in inside]
            if groups and self.batches:
                self.runs.probe(groups, self.batches[0])
            if self.follow_float:
                self._check_one_chain(groups)
            elif self.error_correction and (reason := self._no_one_chain(groups)) is not None:
                if self._must_correct:
                    raise ValueError(
                        f"error_correction={self.error_correction} cannot be had for {type(self.model).__name__}: "
                        f"{reason}. Set error_correction=0."
                    )
                self.error_correction = 0.0
            self.fitting.error_correction = self.error_correction
            self.follow_float = self.follow_float or self.error_correction > 0
            if self.follow_float:
                self.chain = groups[0]
            total = sum(len(group.modules) for group in groups) + bool(outside)
            with self.progress.running(total):
                for index, group in enumerate(groups):
                    if not self.batches:
                        self._walk_without_inputs(group)
                    elif group.is_chain():
                        self._walk_chain(group, [name for other in groups[:index] for name in other.names])
                    else:
                        self._walk_by_whole_runs(group)
                if outside and self.weights.is_finished(OUTSIDE):
                    self.progress.already_done("outside the layers")
                elif outside:
                    with self.progress.layer("outside the layers", outside):
                        self._outside(outside, [name for group in groups for name in group.names])

    def _outside(self, targets: list[str], layers: list[str]) -> None:
        if self.batches:
            with self.weights.whole(layers):
                self.fitting.binarize(targets, self._statistics_of_whole_runs(targets))
                self.weights.finish(OUTSIDE)
        else:
            with self.weights.outside():
                self.fitting.binarize(targets, None)
                self.weights.finish(OUTSIDE)

    def _check_one_chain(self, groups: list[Layers]) -> None:
        if (reason := self._no_one_chain(groups)) is not None:
            raise ValueError(f"{type(self.model).__name__} cannot be refined by the outputs of its layers: {reason}.")

    def _no_one_chain(self, groups: list[Layers]) -> str | None:
        """Why the float model's hidden states cannot be followed layer by layer, or None if they can."""
        return no_one_chain(groups) if self.batches else "there is no calibration"

    def _walk_chain(self, group: Layers, before: list[str]) -> None:
        """A chain of layers; the layers of the groups before it run in the model before they do."""
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
        to_end = index + 1 < len(group.names) or self._keeps_float
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

        wanted = on or self._keeps_float
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

    def _walk_without_inputs(self, group: Layers) -> None:
        for name, layer, names in zip(group.names, group.modules, group.targets, strict=True):
            if self.weights.is_finished(name):
                self.progress.already_done(name)
                continue
            with self.progress.layer(name, names):
                self.weights.load(name)
                layer.to(self.device)
                self.fitting.binarize(names, None)
                layer.to("cpu")
                self.weights.finish(name)

    def _walk_by_whole_runs(self, group: Layers) -> None:
        for name, layer, names, seen in zip(group.names, group.modules, group.targets, group.seen, strict=True):
            with self.progress.layer(name, names):
                if names:
                    statistics = self._statistics_of_whole_runs(names, layer if len(seen) == 1 else None)
                    self.fitting.binarize(names, statistics)

    def _statistics_of_whole_runs(self, names: list[str], last: nn.Module | None = None) -> LayerStatistics:
        """Statistics from runs of the whole model, each ended after the module `last` if there is one."""

        def stop(module, args, output):
            raise Stop

        handle = last.register_forward_hook(stop) if last is not None else None
        try:
            with LayerStatistics({name: self.model.get_submodule(name) for name in names}) as statistics:

                def taken(tokens: torch.Tensor | Mapping[str, Any]) -> Taken:
                    with statistics.taking() as found:
                        self.runs.run(tokens)
                    statistics.multiply(found)
                    return found

                # layers that come and go with a run are there for one run at a time
                most = None if self.weights.resident else 1
                for batch, found in enumerate(in_order(taken, self.ranks.batches(self.batches), self.device, most)):
                    statistics.hold_out(batch >= self.fitted)
                    statistics.add(found)
        finally:
            if handle is not None:
                handle.remove()
        return statistics
