"""Runs of a whole model in calibration: how its layers are called, and what the first of them receives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .calls import Call, Stop, hidden_states, like, replaced_forwards, version
from .layers import Layers
from .weights import LayerWeights


class ModelRuns:
    """
    Args:
        model: in evaluation mode.
        weights: where its weights are.
    """

    def __init__(self, model: PreTrainedModel, weights: LayerWeights):
        self.model = model
        self.weights = weights
        # keep no cache, and as few logits as the model can be asked for
        wanted: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
        parameters = inspect.signature(model.forward).parameters
        head = getattr(model, "get_output_embeddings", None)  # modules that tests walk over have none
        if head is not None and head() is None:
            del wanted["logits_to_keep"]  # a classifier that has it (BioGPT, Zamba2) looks for its token among them
        self._options = {key: value for key, value in wanted.items() if key in parameters}

    def run(self, batch: torch.Tensor | Mapping[str, Any]) -> None:
        """Runs the model on a batch, or until something raises `Stop`."""
        kwargs: dict[str, Any] = dict(self._options)
        if not isinstance(batch, torch.Tensor):
            kwargs.update(batch)
        else:
            kwargs["input_ids"] = batch
            if getattr(self.model.config, "is_encoder_decoder", False):
                kwargs["decoder_input_ids"] = batch
        with suppress(Stop):
            self.model(**kwargs)

    def probe(self, groups: list[Layers], batch: torch.Tensor | Mapping[str, Any]) -> None:
        """A short run that shows how the layers are called; sorts the groups by the order in which they run.

        Where the weights are not in memory, the first layer of each kind runs, and those like it hand on their input.
        In a second run the layers of a chain do so all: an argument that is another one then (`layer(h, outputs[2])`)
        comes of what the layers put out, and cannot be recorded before these are binarized.
        """
        order: list[int] = []
        arguments: dict[str, Call] = {}
        handles = []
        for index, group in enumerate(groups):
            group.seen = [[] for _ in group.modules]
            group.written_between = group.outputs_in_arguments = False
            left: list[tuple[torch.Tensor, int]] = []

            def enter(module, args, kwargs, name, group=group, left=left):
                arguments[name] = Call.of(args, kwargs)
                hidden = hidden_states(args, kwargs)
                if left and hidden is left[-1][0] and version(hidden) != left[-1][1]:
                    group.written_between = True

            for name, layer, calls in zip(group.names, group.modules, group.seen, strict=True):

                def look(module, args, kwargs, output, calls=calls, index=index, left=left):
                    calls.append((hidden_states(args, kwargs), output))
                    handed = output[0] if isinstance(output, (tuple, list)) and output else output
                    if isinstance(handed, torch.Tensor):
                        left.append((handed, version(handed)))
                    order.append(index)

                handles.append(layer.register_forward_pre_hook(partial(enter, name=name), with_kwargs=True))
                handles.append(layer.register_forward_hook(look, with_kwargs=True))
        short = batch[:1, :8] if isinstance(batch, torch.Tensor) else batch
        try:
            if self.weights.resident:
                self.run(short)  # as it is, every layer of it
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
        last = len(order)
        rank = [order.index(index) if index in order else last for index in range(len(groups))]
        groups[:] = [groups[index] for index in sorted(range(len(groups)), key=rank.__getitem__)]
        before: list[str] = []
        for group in groups:
            if group.is_chain():
                with self.weights.whole(before):
                    handed_on = self.record(group, [short], lambda batch, hidden: None)
                again = zip(group.names, handed_on, strict=True)
                group.outputs_in_arguments = not all(
                    len(found) == 1 and found[0].has_tensors_of(arguments[name]) for name, found in again
                )
            before += group.names
        if not all(group.is_chain() for group in groups):
            self.weights.stay(f"the layers of {type(self.model).__name__} hand on more than their hidden states")

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
            self.run(batch)

    def record(
        self,
        group: Layers,
        batches: Iterable[torch.Tensor | Mapping[str, Any]],
        put: Callable[[int, torch.Tensor], None],
    ) -> list[list[Call]]:
        """Hands on the hidden states that enter the first layer; each layer's other arguments, batch by batch.

        Raises:
            ValueError: the model changes the hidden states of a batch between two layers, which it did not in `probe`.
        """
        calls: list[list[Call]] = [[] for _ in group.modules]
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        entered: list[tuple[torch.Tensor, int]] = []

        def recorder(index: int):
            def forward(*args, **kwargs):
                hidden = hidden_states(args, kwargs)
                assert hidden is not None  # `Layers.is_chain` has seen it
                if index == 0:
                    entered[:] = [(hidden, version(hidden))]
                    put(len(calls[0]), hidden)
                elif hidden is not entered[0][0] or version(hidden) != entered[0][1]:
                    raise ValueError(
                        f"{type(self.model).__name__} changes the hidden states before {group.names[index]} in "
                        f"calibration batch {len(calls[index])} (of this process) and did not in the one that was "
                        "tried. Give a batch like this one (with the same kinds of inputs) as the first of the dataset."
                    )
                batch = len(calls[index])
                call = Call.of(args, kwargs)
                calls[index].append(call.sharing(calls[index][0] if batch else None, found))
                if index == len(group.modules) - 1:
                    raise Stop
                return like(group.seen[index][0][1], hidden)

            return forward

        recorders = [recorder(index) for index in range(len(group.modules))]
        with replaced_forwards(group.modules, recorders):
            for batch in batches:
                self.run(batch)
                found.clear()
        return calls
