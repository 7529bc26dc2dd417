"""The walk over a model's layers in calibration: each layer's inputs come from the layers binarized before it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..algorithms.refinement import release_graphs
from ..experts.matrices import is_experts
from ..nn import ARBExperts, ARBLinear
from .activations import INPUTS, Activations
from .calls import Call, Stop, hidden_states, like, replaced_forwards
from .correction import Corrections, Reading, Step, corrected, find_steps, sharing_weights
from .distributed import Ranks
from .experts import LayerStatistics, RoutedInputs, Taken
from .layers import Layers, find_layers
from .progress import Progress
from .weights import OUTSIDE, LayerWeights
from .workers import in_order, one_thread

# Matrices that are fitted at once on the CPU: the three large ones of a decoder layer and its attention's take equally
# long, so that more would not end sooner, and each holds some copies of its weight and calibration matrix.
FITS = 4

# (name, float module, calibration matrix or None, tokens) -> the binarized module and its output error
Binarize = Callable[[str, nn.Module, "torch.Tensor | None", int], "tuple[ARBLinear, float | None]"]
# (name, float experts, their inputs or None) -> the binarized module and the output errors of its matrices
BinarizeExperts = Callable[[str, nn.Module, "RoutedInputs | None"], "tuple[ARBExperts, list[float]]"]
# (name, float module, binarized module, what the layer received); is called after each of the two above
Measure = Callable[[str, nn.Module, nn.Module, LayerStatistics], None]


@dataclass
class LayerTurn:
    """A layer of a chain that was binarized and has not yet computed the inputs of the next.

    Attributes:
        name: of the layer.
        layer: the layer with its binarized modules, on `device`; it may be changed.
        targets: names in the model of what was binarized in it.
        device: where it runs.
        inputs: its hidden states in, batch by batch, on the CPU.
        references: hidden states out, on the CPU: what the float layer made of `inputs` or, where the walk follows the
            float model, of the float model's hidden states.
        calls: its other arguments, batch by batch.
        modules: name -> the float module that was binarized; with error correction, of the weight that was fitted.
        statistics: their calibration matrices.
        fitted: how many batches something may be fitted to; the others follow them.
    """

    name: str
    layer: nn.Module
    targets: list[str]
    device: torch.device
    inputs: Activations
    references: list[torch.Tensor]
    calls: list[Call]
    modules: dict[str, nn.Module]
    statistics: LayerStatistics
    fitted: int

    def run(self, batch: int) -> torch.Tensor:
        """The layer's output `[B, L, H]` for a batch as it is now, on `device`; with a gradient where that is on."""
        return self.calls[batch].run(self.layer, self.inputs[batch].to(self.device), self.device)


AfterLayer = Callable[[LayerTurn], None]


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
    ):
        self.model = model
        self.ranks = ranks or Ranks()
        self.records = {} if records is None else records
        if after_layer is not None and self.ranks.size > 1:
            raise ValueError("Scales cannot be tuned by a layer's output on several ranks: start one process.")
        self.fitted = len(batches) - held_out - self.ranks.first_batch(len(batches))  # of this rank's
        self.measure = measure
        self.binarize_experts = binarize_experts
        self.binarize = binarize
        self.batches = batches
        self.device = torch.device(device)
        self.weights = weights or LayerWeights()
        self.activations = Activations() if activations is None else activations  # an empty one is false
        self.after_layer = after_layer
        self.follow_float = follow_float
        self.error_correction = error_correction
        self._must_correct = must_correct
        # with `follow_float`, what comes out of the float model's last layer, batch by batch, once the walk is over
        self.float_outputs: list[torch.Tensor] = []
        self.chain: Layers | None = None  # with `follow_float`, the layers
        self.progress = progress or Progress()
        self.errors: list[float] = []
        self._targets = list(targets)
        self._model_kwargs = self._call_kwargs()

    @torch.no_grad()
    def run(self) -> None:
        """Replaces every target by its binarized module.

        Raises:
            ValueError: NaN or Inf in a weight or in the activations that reach a module, which it names.
        """
        with torch.autocast(self.device.type, enabled=False):
            groups = self._find_layers()
            inside = {name for group in groups for names in group.targets for name in names}
            outside = [name for name in self._targets if name not in inside]
            if groups and self.batches:
                self._probe(groups)
            if self.follow_float:
                self._check_one_chain(groups)
            elif self.error_correction and (reason := self._no_one_chain(groups)) is not None:
                if self._must_correct:
                    raise ValueError(
                        f"error_correction={self.error_correction} cannot be had for {type(self.model).__name__}: "
                        f"{reason}. Set error_correction=0."
                    )
                self.error_correction = 0.0
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
        release_graphs()

    def _outside(self, targets: list[str], layers: list[str]) -> None:
        if self.batches:
            with self.weights.whole(layers):
                self._binarize_all(targets, self._statistics_of_whole_runs(targets))
                self.weights.finish(OUTSIDE)
        else:
            with self.weights.outside():
                self._binarize_all(targets, None)
                self.weights.finish(OUTSIDE)

    def _find_layers(self) -> list[Layers]:
        return find_layers(self.model, self._targets)

    def _check_one_chain(self, groups: list[Layers]) -> None:
        if (reason := self._no_one_chain(groups)) is not None:
            raise ValueError(f"{type(self.model).__name__} cannot be refined by the outputs of its layers: {reason}.")

    def _no_one_chain(self, groups: list[Layers]) -> str | None:
        """Why the float model's hidden states cannot be followed layer by layer, or None if they can."""
        if not self.batches:
            return "there is no calibration"
        if len(groups) != 1:
            lists = ", ".join(group.names[0].rpartition(".")[0] for group in groups) or "none"
            return f"it needs one list of layers, and these hold linears to binarize: {lists}"
        if not groups[0].is_chain():
            name = groups[0].names[0].rpartition(".")[0]
            return f"the layers of {name} hand on more than their hidden states, or do not run in order"
        return None

    def _call_kwargs(self) -> dict[str, Any]:
        """Keep no cache, and as few logits as the model can be asked for."""
        parameters = inspect.signature(self.model.forward).parameters
        wanted = {"use_cache": False, "logits_to_keep": 1}
        return {key: value for key, value in wanted.items() if key in parameters}

    def _run_model(self, batch: torch.Tensor | Mapping[str, Any]) -> None:
        kwargs = dict(self._model_kwargs)
        if not isinstance(batch, torch.Tensor):
            kwargs.update(batch)
        else:
            kwargs["input_ids"] = batch
            if getattr(self.model.config, "is_encoder_decoder", False):
                kwargs["decoder_input_ids"] = batch
        with suppress(Stop):
            self.model(**kwargs)

    def _probe(self, groups: list[Layers]) -> None:
        """One short run that shows how the layers are called; sorts the groups by the order in which they run.

        Where the weights are not in memory, the first layer of each kind runs, and those like it hand on their input.
        """
        order: list[int] = []
        handles = []
        for index, group in enumerate(groups):
            group.seen = [[] for _ in group.modules]
            for layer, calls in zip(group.modules, group.seen, strict=True):

                def look(module, args, kwargs, output, calls=calls, index=index):
                    calls.append((hidden_states(args, kwargs), output))
                    order.append(index)

                handles.append(layer.register_forward_hook(look, with_kwargs=True))
        batch = self.batches[0]
        short = batch[:1, :8] if isinstance(batch, torch.Tensor) else batch
        try:
            if self.weights.resident:
                self._run_model(short)  # as it is, every layer of it
            else:
                self._run_one_of_each_kind(groups, short)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            given = "token ids alone" if isinstance(batch, torch.Tensor) else ", ".join(map(repr, batch))
            raise ValueError(
                f"{type(self.model).__name__} does not run on {given} ({type(error).__name__}: {error}). Give a list "
                "of its inputs, as its processor makes them, as dataset, or dataset=None to binarize without "
                "calibration."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not all(group.is_chain() for group in groups):
            self.weights.stay(f"the layers of {type(self.model).__name__} hand on more than their hidden states")
        last = len(order)
        rank = [order.index(index) if index in order else last for index in range(len(groups))]
        groups[:] = [groups[index] for index in sorted(range(len(groups)), key=rank.__getitem__)]

    def _run_one_of_each_kind(self, groups: list[Layers], batch: torch.Tensor | Mapping[str, Any]) -> None:
        modules: list[nn.Module] = []
        forwards: list[Callable] = []
        first: list[str] = []
        for group in groups:
            kinds = group.kinds()
            first += [group.names[index] for index in sorted(set(kinds))]
            for index, kind in enumerate(kinds):
                if kind != index:

                    def hand_on(*args, seen=group.seen[kind], **kwargs):
                        return like(seen[0][1], hidden_states(args, kwargs)) if seen else None

                    modules.append(group.modules[index])
                    forwards.append(hand_on)
        with replaced_forwards(modules, forwards), self.weights.whole(first):
            self._run_model(batch)

    def _record(self, group: Layers) -> tuple[Activations, list[list[Call]]]:
        """The hidden states that enter the first layer, and each layer's other arguments, batch by batch."""
        first = self.activations
        first.clear()
        calls: list[list[Call]] = [[] for _ in group.modules]

        def recorder(index: int):
            def forward(*args, **kwargs):
                hidden = hidden_states(args, kwargs)
                if index == 0:
                    assert hidden is not None  # `Layers.is_chain` has seen it
                    self._put(first, len(calls[0]), hidden, hidden)
                kept = (None, *args[1:]) if args else ()
                rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
                batch = len(calls[index])
                calls[index].append(Call(kept, rest).sharing(calls[index][0] if batch else None))
                if index == len(group.modules) - 1:
                    raise Stop
                return like(group.seen[index][0][1], hidden)

            return forward

        recorders = [recorder(index) for index in range(len(group.modules))]
        with replaced_forwards(group.modules, recorders), one_thread(self.device):
            for tokens in self.ranks.batches(self.batches):
                self._run_model(tokens)
        first.advance(INPUTS)
        return first, calls

    def _walk_chain(self, group: Layers, before: list[str]) -> None:
        """A chain of layers; the layers of the groups before it run in the model before they do."""
        if all(self.weights.is_finished(name) for name in group.names):
            for name in group.names:
                self.progress.already_done(name)
            return
        with self.weights.whole(before):
            hidden, calls = self._record(group)
        finished = [self.weights.is_finished(name) for name in group.names]
        done = next(index for index, found in enumerate(finished) if not found)
        # what an interrupted run finished need not run again if its outputs were kept
        start = done if done and hidden.restore(group.names[done - 1]) else 0
        for index, (name, names) in enumerate(zip(group.names, group.targets, strict=True)):
            if index < start:
                self.progress.already_done(name)
                continue
            with self.progress.layer(name, [] if finished[index] else names):
                self._turn(group, index, finished[index], hidden, calls[index])
            calls[index].clear()
        hidden.clear()

    def _turn(self, group: Layers, index: int, finished: bool, hidden: Activations, calls: list[Call]) -> None:
        """One layer: its calibration matrices, its binarized form, its outputs."""
        name, layer, names = group.names[index], group.modules[index], group.targets[index]
        self.weights.load(name)
        layer.to(self.device)
        inputs = _EveryOther(hidden) if self.follow_float else hidden
        references: list[torch.Tensor] = []
        work = bool(names) and not finished
        try:
            if self.follow_float and not (work and self.error_correction):
                with self.weights.in_float(name, layer) as of_float:
                    of_float.to(self.device)
                    references += self._outputs(of_float, _EveryOther(hidden, 0), calls)
                    if of_float is not layer:
                        of_float.to("cpu")
            if work:
                modules = {target: self.model.get_submodule(target) for target in names}
                if self.error_correction:
                    found = self._binarize_in_steps(name, layer, modules, hidden, calls, references)
                else:
                    keep = self.after_layer is not None and not self.follow_float
                    found = self._binarize_at_once(layer, modules, inputs, calls, references if keep else None)
                if self.after_layer is not None:
                    fitted, statistics = found
                    turn = LayerTurn(
                        name, layer, names, self.device, inputs, references, calls, fitted, statistics, self.fitted
                    )
                    self.after_layer(turn)
                    del turn, fitted, statistics
                del found, modules
            if index + 1 < len(group.modules):
                run = self._runs(layer, inputs, calls)
                for batch, output in enumerate(in_order(run, range(len(calls)), self.device)):
                    self._put(hidden, batch, output, references[batch] if self.follow_float else output)
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
            run = self._runs(layer, inputs, calls)

            def taken(batch: int) -> tuple[torch.Tensor, Taken]:
                with statistics.taking() as found:
                    return run(batch), found

            for batch, (output, found) in enumerate(in_order(taken, range(len(calls)), self.device)):
                statistics.hold_out(batch >= self.fitted)
                statistics.add(found)
                if outputs is not None:
                    outputs.append(output.to("cpu"))
                del output, found
        return self._binarize_all(list(modules), statistics), statistics

    def _binarize_in_steps(
        self,
        name: str,
        layer: nn.Module,
        modules: dict[str, nn.Module],
        hidden: Activations,
        calls: list[Call],
        references: list[torch.Tensor],
    ) -> tuple[dict[str, nn.Module], LayerStatistics]:
        """The modules of a layer in the order in which they run, each fitted to make up for the errors before it.

        Args:
            name: of the layer.
            layer: the layer.
            modules: name -> float module.
            hidden: the hidden states of both models.
            calls: the layer's other arguments.
            references: the float layer's outputs go here.

        Returns:
            the modules with the weights that they were fitted to, and their statistics if there is an `after_layer`.
        """
        of_float = sharing_weights(layer)
        wanted, given = _EveryOther(hidden, 0), _EveryOther(hidden)
        steps = None
        if calls:
            steps = find_steps(layer, modules, lambda: self._runs(layer, given, calls[:1])(0))
        steps = self.ranks.exchange(steps, "looking at how a layer runs")[0]
        assert steps is not None  # the first rank has batches
        fitted: dict[str, nn.Module] = {}
        every = LayerStatistics(modules)
        for step in steps:
            statistics = LayerStatistics({target: modules[target] for target in step.names})
            statistics.corrections = Corrections(step, modules, self.device)
            self._gather(name, layer, of_float, step, step is steps[-1], statistics, wanted, given, calls, references)
            fitted |= self._binarize_all(step.names, statistics)
            if self.after_layer is not None:
                every.absorb(statistics)
        return fitted, every

    def _gather(
        self,
        name: str,
        layer: nn.Module,
        of_float: nn.Module,
        step: Step,
        last: bool,
        statistics: LayerStatistics,
        wanted: Activations,
        given: Activations,
        calls: list[Call],
        references: list[torch.Tensor],
    ) -> None:
        """Runs both forms of a layer up to a step, the float one to its end where the step is the last."""
        corrections = statistics.corrections
        assert corrections is not None
        with (
            statistics,
            Reading(of_float, name, step, whole=last) as of_wanted,
            Reading(layer, name, step, whole=False) as of_given,
        ):

            def taken(batch: int) -> tuple[torch.Tensor | None, dict[str, torch.Tensor], Taken]:
                output = None
                with of_wanted.reading() as ought:
                    output = self._runs(of_float, wanted, calls)(batch)
                with of_given.reading() as has, statistics.taking() as found:
                    self._runs(layer, given, calls)(batch)
                return output, corrections.differences(ought, has), found

            for batch, (output, differences, found) in enumerate(in_order(taken, range(len(calls)), self.device)):
                statistics.hold_out(batch >= self.fitted)
                if batch < self.fitted:
                    with one_thread(self.device):
                        corrections.add(differences, {each.name: each.copy for each in found.inputs})
                statistics.add(found)
                if last:
                    assert output is not None
                    references.append(output.to("cpu"))
                del output, differences, found

    def _outputs(self, layer: nn.Module, inputs: Activations, calls: list[Call]) -> list[torch.Tensor]:
        """The layer's outputs, batch by batch, on the CPU."""
        run = self._runs(layer, inputs, calls)
        return [output.to("cpu") for output in in_order(run, range(len(calls)), self.device)]

    def _runs(self, layer: nn.Module, inputs: Activations, calls: list[Call]) -> Callable[[int], torch.Tensor]:
        """The layer's output for a batch."""

        def run(batch: int) -> torch.Tensor:
            hidden = inputs[batch].to(self.device, non_blocking=True)  # from page-locked memory the host need not wait
            return calls[batch].run(layer, hidden, self.device)

        return run

    def _put(self, kept: Activations, batch: int, hidden: torch.Tensor, of_float: torch.Tensor) -> None:
        """Keeps the hidden states of a batch; where the float model is followed, behind those of the float model."""
        if self.follow_float:
            kept.put(2 * batch, of_float)
            kept.put(2 * batch + 1, hidden)
        else:
            kept.put(batch, hidden)

    def _walk_without_inputs(self, group: Layers) -> None:
        for name, layer, names in zip(group.names, group.modules, group.targets, strict=True):
            if self.weights.is_finished(name):
                self.progress.already_done(name)
                continue
            with self.progress.layer(name, names):
                self.weights.load(name)
                layer.to(self.device)
                self._binarize_all(names, None)
                layer.to("cpu")
                self.weights.finish(name)

    def _walk_by_whole_runs(self, group: Layers) -> None:
        for name, layer, names, seen in zip(group.names, group.modules, group.targets, group.seen, strict=True):
            with self.progress.layer(name, names):
                if names:
                    self._binarize_all(names, self._statistics_of_whole_runs(names, layer if len(seen) == 1 else None))

    def _statistics_of_whole_runs(self, names: list[str], last: nn.Module | None = None) -> LayerStatistics:
        """Statistics from runs of the whole model, each ended after the module `last` if there is one."""

        def stop(module, args, output):
            raise Stop

        handle = last.register_forward_hook(stop) if last is not None else None
        try:
            with LayerStatistics({name: self.model.get_submodule(name) for name in names}) as statistics:

                def taken(tokens: torch.Tensor | Mapping[str, Any]) -> Taken:
                    with statistics.taking() as found:
                        self._run_model(tokens)
                    return found

                for batch, found in enumerate(in_order(taken, self.ranks.batches(self.batches), self.device)):
                    statistics.hold_out(batch >= self.fitted)
                    statistics.add(found)
        finally:
            if handle is not None:
                handle.remove()
        return statistics

    def _binarize_all(self, names: list[str], statistics: LayerStatistics | None) -> dict[str, nn.Module]:
        """Returns: name -> the float module that was binarized on this rank."""
        owners = self.ranks.owners({name: self.model.get_submodule(name) for name in names})
        if statistics is not None:
            self.ranks.sum_statistics(statistics, owners)
        done: dict[str, nn.Module] = {}
        sources: dict[str, nn.Module] = {}
        own = [name for name in names if owners.get(name, self.ranks.rank) == self.ranks.rank]
        linears = [name for name in own if not is_experts(self.model.get_submodule(name))]

        def fit(name: str) -> tuple[nn.Module, list[float], float]:
            start = time.perf_counter()
            module = sources[name] = self._to_fit(name, statistics)
            hessian = None if statistics is None else statistics.linears.hessian(name)
            tokens = 0 if statistics is None else statistics.linears.tokens(name)
            packed, error = self.binarize(name, module, hessian, tokens)
            return packed, [] if error is None else [error], time.perf_counter() - start

        if statistics is not None:  # made of the wider sums once, not by several threads
            for name in linears:
                statistics.linears.hessian(name)
        fits = in_order(fit, linears, self.device, FITS)
        for name in own:
            packed: nn.Module
            errors: list[float]
            module = self.model.get_submodule(name)
            if is_experts(module):
                start = time.perf_counter()
                assert self.binarize_experts is not None
                routed = None if statistics is None else statistics.experts.pop(name)
                with one_thread(self.device):
                    packed, errors = self.binarize_experts(name, module, routed)
                seconds = time.perf_counter() - start
            else:
                packed, errors, seconds = next(fits)
                module = sources[name]
            self.errors += errors
            if self.measure is not None and statistics is not None:
                self.measure(name, module, packed, statistics)
                statistics.held_out_experts.pop(name, None)
            if name in owners:  # of experts, every rank has them all by now
                done[name] = packed
            self.model.set_submodule(name, packed)
            self.progress.linear(name, seconds, errors)
        fits.close()
        for name, module in self.ranks.share(done, self.device, self.records).items():
            self.model.set_submodule(name, module)
        return sources

    def _to_fit(self, name: str, statistics: LayerStatistics | None) -> nn.Module:
        """The float module of this name, with error correction that of the weight to fit."""
        module = self.model.get_submodule(name)
        if statistics is None or statistics.corrections is None:
            return module
        hessian = statistics.linears.hessian(name)
        if hessian is None:
            return module
        return corrected(module, hessian, statistics.corrections.sums.pop(name), self.error_correction)


class _EveryOther(Activations):
    """The hidden states of the model that is binarized, behind those of the float model; only to be read.

    Args:
        both: in turn those of the float model and of the other.
        which: 1, or 0 for those of the float model.
    """

    def __init__(self, both: Activations, which: int = 1):
        super().__init__()
        self._both = both
        self._which = which

    def __len__(self) -> int:
        return len(self._both) // 2

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._both[2 * batch + self._which]
