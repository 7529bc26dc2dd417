"""The walk over a model's layers in calibration: each layer's inputs come from the layers binarized before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..nn import ARBExperts, ARBLinear
from .experts import LayerStatistics, RoutedInputs

# (name, float module, calibration matrix or None, tokens) -> the binarized module and its output error
Binarize = Callable[[str, nn.Module, "torch.Tensor | None", int], "tuple[ARBLinear, float | None]"]
# (name, float experts, their inputs) -> the binarized module and the output errors of its matrices
BinarizeExperts = Callable[[str, nn.Module, RoutedInputs], "tuple[ARBExperts, list[float]]"]
# (name, float module, binarized module, what the layer received); is called after each of the two above
Measure = Callable[[str, nn.Module, nn.Module, LayerStatistics], None]


class _Stop(Exception):
    """Ends a run of the model where nothing that follows is needed."""


@dataclass
class _Call:
    """The arguments of one call of a layer, without the hidden states that the layers hand on."""

    args: tuple
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (self.args, self.kwargs))
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        output = layer(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


@dataclass
class _Layers:
    """A list of layers that run one after the other: one `ModuleList` of the model."""

    names: list[str]
    modules: list[nn.Module]
    targets: list[list[str]]
    # per layer, what a short run saw: (hidden states in, output)
    seen: list[list[tuple[torch.Tensor | None, Any]]] = field(default_factory=list)

    def is_chain(self) -> bool:
        """Whether each layer runs once, in order, and hands nothing but its hidden states to the next."""
        previous = None
        for calls in self.seen:
            if len(calls) != 1:
                return False
            hidden, output = calls[0]
            if hidden is None or (previous is not None and hidden is not previous):
                return False
            if isinstance(output, (tuple, list)):
                if not output or any(part is not None for part in output[1:]):
                    return False
                output = output[0]
            if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
                return False
            previous = output
        return True


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
        batches: token ids int64 `[B, L]`, or other inputs of the model's `forward` by their names.
        device: where a layer runs and is binarized; its weights go there and come back.
        binarize_experts: makes the binarized module of experts; needed where there are any.
        held_out: how many batches, the last ones, nothing is fitted to.
        measure: is called with each module and its binarized form, and with the statistics, where what was held out
            is apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[str],
        binarize: Binarize,
        batches: Sequence[torch.Tensor | Mapping[str, Any]],
        device: torch.device | str = "cpu",
        binarize_experts: BinarizeExperts | None = None,
        held_out: int = 0,
        measure: Measure | None = None,
    ):
        self.model = model
        self.fitted = len(batches) - held_out
        self.measure = measure
        self.binarize_experts = binarize_experts
        self.binarize = binarize
        self.batches = batches
        self.device = torch.device(device)
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
            if groups:
                self._probe(groups)
            total = sum(len(group.modules) for group in groups) + bool(outside)
            with tqdm(total=total, desc="Binarizing", unit="layer") as progress:
                for group in groups:
                    walk = self._walk_chain if group.is_chain() else self._walk_by_whole_runs
                    for _ in walk(group):
                        self._advance(progress)
                if outside:
                    self._binarize_all(outside, self._statistics_of_whole_runs(outside))
                    self._advance(progress)

    def _advance(self, progress: tqdm) -> None:
        if self.errors:
            progress.set_postfix({"output error": f"{sum(self.errors) / len(self.errors):.4f}"}, refresh=False)
        progress.update()

    def _find_layers(self) -> list[_Layers]:
        groups: list[_Layers] = []
        found: list[str] = []
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in found):
                continue
            if any(target.startswith(name + ".") for target in self._targets):
                found.append(name)
                names = [f"{name}.{index}" for index in range(len(module))]
                targets = [[t for t in self._targets if t.startswith(layer + ".")] for layer in names]
                groups.append(_Layers(names, list(module), targets))
        return groups

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
        with suppress(_Stop):
            self.model(**kwargs)

    def _probe(self, groups: list[_Layers]) -> None:
        """One short run that shows how the layers are called; sorts the groups by the order in which they run."""
        order: list[int] = []
        handles = []
        for index, group in enumerate(groups):
            group.seen = [[] for _ in group.modules]
            for layer, calls in zip(group.modules, group.seen, strict=True):

                def look(module, args, kwargs, output, calls=calls, index=index):
                    calls.append((_hidden_states(args, kwargs), output))
                    order.append(index)

                handles.append(layer.register_forward_hook(look, with_kwargs=True))
        batch = self.batches[0]
        try:
            self._run_model(batch[:1, :8] if isinstance(batch, torch.Tensor) else batch)
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
        last = len(order)
        rank = [order.index(index) if index in order else last for index in range(len(groups))]
        groups[:] = [groups[index] for index in sorted(range(len(groups)), key=rank.__getitem__)]

    def _record(self, group: _Layers) -> tuple[list[torch.Tensor], list[list[_Call]]]:
        """The hidden states that enter the first layer, and each layer's other arguments, batch by batch."""
        first: list[torch.Tensor] = []
        calls: list[list[_Call]] = [[] for _ in group.modules]
        tuples = [isinstance(seen[0][1], (tuple, list)) for seen in group.seen]
        lengths = [len(seen[0][1]) if is_tuple else 0 for seen, is_tuple in zip(group.seen, tuples, strict=True)]

        def recorder(index: int):
            def forward(*args, **kwargs):
                hidden = _hidden_states(args, kwargs)
                if index == 0:
                    assert hidden is not None  # `_Layers.is_chain` has seen it
                    first.append(hidden)
                kept = (None, *args[1:]) if args else ()
                rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
                batch = len(calls[index])
                calls[index].append(_shared(_Call(kept, rest), calls[index][0] if batch else None))
                if index == len(group.modules) - 1:
                    raise _Stop
                if not tuples[index]:
                    return hidden
                return type(group.seen[index][0][1])((hidden, *[None] * (lengths[index] - 1)))

            return forward

        with _replaced_forwards(group.modules, [recorder(index) for index in range(len(group.modules))]):
            for tokens in self.batches:
                self._run_model(tokens)
        return first, calls

    def _walk_chain(self, group: _Layers) -> Iterator[None]:
        hidden, calls = self._record(group)
        for index, (layer, names) in enumerate(zip(group.modules, group.targets, strict=True)):
            layer.to(self.device)
            try:
                if names:
                    modules = {name: self.model.get_submodule(name) for name in names}
                    with LayerStatistics(modules) as statistics:
                        for batch, call in enumerate(calls[index]):
                            statistics.hold_out(batch >= self.fitted)
                            call.run(layer, hidden[batch].to(self.device), self.device)
                            statistics.end_batch()
                    self._binarize_all(names, statistics)
                    del statistics
                if index + 1 < len(group.modules):
                    for batch, call in enumerate(calls[index]):
                        output = call.run(layer, hidden[batch].to(self.device), self.device)
                        hidden[batch] = output.to(hidden[batch].device)
            finally:
                layer.to("cpu")
            calls[index].clear()
            yield

    def _walk_by_whole_runs(self, group: _Layers) -> Iterator[None]:
        for layer, names, seen in zip(group.modules, group.targets, group.seen, strict=True):
            if names:
                self._binarize_all(names, self._statistics_of_whole_runs(names, layer if len(seen) == 1 else None))
            yield

    def _statistics_of_whole_runs(self, names: list[str], last: nn.Module | None = None) -> LayerStatistics:
        """Statistics from runs of the whole model, each ended after the module `last` if there is one."""

        def stop(module, args, output):
            raise _Stop

        handle = last.register_forward_hook(stop) if last is not None else None
        try:
            with LayerStatistics({name: self.model.get_submodule(name) for name in names}) as statistics:
                for batch, tokens in enumerate(self.batches):
                    statistics.hold_out(batch >= self.fitted)
                    self._run_model(tokens)
                    statistics.end_batch()
        finally:
            if handle is not None:
                handle.remove()
        return statistics

    def _binarize_all(self, names: list[str], statistics: LayerStatistics) -> None:
        linears = statistics.linears
        for name in names:
            module = self.model.get_submodule(name)
            routed = statistics.experts.pop(name, None)
            packed: nn.Module
            if routed is None:
                packed, error = self.binarize(name, module, linears.hessian(name), linears.tokens(name))
                self.errors += [] if error is None else [error]
            else:
                assert self.binarize_experts is not None
                packed, errors = self.binarize_experts(name, module, routed)
                self.errors += errors
            if self.measure is not None:
                self.measure(name, module, packed, statistics)
            statistics.held_out_experts.pop(name, None)
            self.model.set_submodule(name, packed)


def _hidden_states(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, torch.Tensor) else None


def _shared(call: _Call, first: _Call | None) -> _Call:
    """The call with its tensors replaced by those of the first batch where they are equal (masks, positions)."""
    if first is None:
        return call
    known: list[torch.Tensor] = []
    tree_map(lambda x: known.append(x) if isinstance(x, torch.Tensor) else None, (first.args, first.kwargs))

    def replace(value):
        if not isinstance(value, torch.Tensor):
            return value
        return next((k for k in known if k.shape == value.shape and k.dtype == value.dtype and k.equal(value)), value)

    return _Call(*tree_map(replace, (call.args, call.kwargs)))


@contextmanager
def _replaced_forwards(modules: list[nn.Module], forwards: list[Callable]) -> Iterator[None]:
    """Gives each module another `forward` for a while. The modules stay, and with them what the model reads of them."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
