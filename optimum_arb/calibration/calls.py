"""What a layer is called with, kept so that it can be called again by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache

from .activations import Activations, CopiedAhead


class Stop(Exception):
    """Ends a run of the model where nothing that follows is needed."""


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


@dataclass
class Call:
    """The arguments of one call of a layer, without the hidden states that the layers hand on."""

    args: tuple
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any]) -> Call:
        """What is left of a layer's arguments without the hidden states; the containers are its own.

        None stands for a cache, which Granite MoE makes unasked: a layer that runs again would attend to what its runs
        before left there.
        """
        rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
        given = (None, *args[1:]) if args else (), rest
        return cls(*tree_map(lambda x: None if _is_cache(x) else x, given, is_leaf=_is_cache))

    def has_tensors_of(self, other: Call) -> bool:
        """Whether the tensors among its arguments are equal to those of another call, one after the other."""
        own, others = (
            [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, torch.Tensor)] for call in (self, other)
        )
        return len(own) == len(others) and all(
            x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(own, others, strict=True)
        )

    def run(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        device: torch.device,
        moved: Mapping[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The hidden states that the layer makes of `hidden`, on its device.

        Args:
            layer, hidden, device: the layer and its input, on the device.
            moved: tensors that are there already, by the id of those of this call.
        """
        known = moved or {}

        def move(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else x.to(device)

        args, kwargs = tree_map(move, (self.args, self.kwargs))
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        output = layer(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def sharing(self, first: Call | None, found: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Call:
        """The call with its tensors replaced by those of another where they are equal (masks, positions).

        Args:
            first: the other call, of the same layer.
            found: of the tensors that this run of the model has handed to layers, by their ids, the tensor and what
                took its place; grows. All layers receive the same ones, and comparing them in each of a 7B's 32 takes
                half of the time of the run.
        """
        if first is None:
            return self
        known: list[torch.Tensor] = []
        tree_map(lambda x: known.append(x) if isinstance(x, torch.Tensor) else None, (first.args, first.kwargs))

        def replace(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in found and any(k is found[id(value)][1] for k in known):
                return found[id(value)][1]
            same = (k for k in known if k.shape == value.shape and k.dtype == value.dtype and k.equal(value))
            result = next(same, value)
            found[id(value)] = value, result  # with the tensor itself, whose id is not another's while it is here
            return result

        return Call(*tree_map(replace, (self.args, self.kwargs)))


def layer_runs(
    layer: nn.Module, inputs: Activations, calls: Sequence[Call], device: torch.device
) -> Callable[[int], torch.Tensor]:
    """A function that gives the layer's output for a batch, all on the device."""
    call = calling(layer, calls, device)
    hidden = CopiedAhead(inputs, len(calls), device) if device.type == "cuda" else None

    def run(batch: int) -> torch.Tensor:
        # a copy, also on the CPU: a layer may write into its input, and the next run of it reads that again
        return call(batch, inputs[batch].to(device, copy=True) if hidden is None else hidden[batch])

    return run


def calling(
    layer: nn.Module, calls: Sequence[Call], device: torch.device
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A function that gives the layer's output for the arguments of a batch and hidden states, all on the device."""
    # what all calls have in common is copied to a GPU once: each copy makes the host wait for it
    moved: dict[int, torch.Tensor] = {}
    if calls and device.type != "cpu":
        first = [x for x in tree_leaves((calls[0].args, calls[0].kwargs)) if isinstance(x, torch.Tensor)]
        moved = {id(x): x.to(device) for x in first}
    return lambda batch, hidden: calls[batch].run(layer, hidden, device, moved)


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was written into; that of inference mode, which is not counted, is always -1."""
    return -1 if tensor.is_inference() else tensor._version


def hidden_states(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden states among the arguments of a layer."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, torch.Tensor) else None


def like(output: Any, hidden: torch.Tensor | None) -> Any:
    """What a layer would return if it handed on its hidden states: of the form of an output."""
    if isinstance(output, (tuple, list)):
        return type(output)((hidden, *[None] * (len(output) - 1)))
    return hidden


@contextmanager
def replaced_forwards(modules: list[nn.Module], forwards: list[Callable]) -> Iterator[None]:
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
