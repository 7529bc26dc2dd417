"""The walk over a model's layers in calibration: each layer's inputs come from the layers binarized before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import ARBConfig
from .activations import Activations
from .calls import Stop
from .chain import ChainWalk
from .experts import LayerStatistics, Taken
from .fitting import Binarize, BinarizeExperts, Fitting, Measure
from .layers import Layers, find_layers, no_one_chain
from .progress import Progress
from .ranks import Ranks
from .runs import ModelRuns
from .turn import AfterLayer
from .weights import OUTSIDE, LayerWeights
from .workers import in_order


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
        chain = ChainWalk(
            self.model,
            self.runs,
            self.fitting,
            self.batches,
            self.fitted,
            self.device,
            self.weights,
            self.activations,
            self.progress,
            self.ranks,
            self.after_layer,
            self.follow_float,
            self.error_correction,
            self._keeps_float,
        )
        chain.run(group, before)
        self.float_outputs = chain.float_outputs

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
