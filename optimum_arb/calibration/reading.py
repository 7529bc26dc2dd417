"""The steps of a layer: which linears are binarized together, and what a run of the layer up to them comes to."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..experts.matrices import is_experts
from .calls import Stop, version

# Where a residual stream is read: at the layer's own input.
LAYER_INPUT = ""


@dataclass(frozen=True)
class Step:
    """Modules of a layer that receive the same input and are binarized together.

    Attributes:
        names: of the modules in the model.
        residual: name of a linear -> the submodule of the layer whose input, with the linear's output, is the residual
            stream behind it; `LAYER_INPUT` is the layer itself.
        repeats: whether its only module runs more than once. It is fitted to the inputs of all its runs and not
            corrected: one weight cannot put right what differs from run to run.
    """

    names: list[str]
    residual: dict[str, str] = field(default_factory=dict)
    repeats: bool = False


@dataclass
class _Seen:
    """A tensor that entered submodules of a layer, and the first of them."""

    name: str
    tensor: torch.Tensor


@torch.no_grad()
def find_steps(layer: nn.Module, targets: Mapping[str, nn.Module], run: Callable[[], torch.Tensor]) -> list[Step]:
    """In which order the modules of a layer run, which share an input, and which write to the residual stream.

    The last is seen by numbers: a linear does whose output, added to something that was there before it, gives exactly
    what a later module of the layer receives or the layer puts out.

    Args:
        layer: the float layer.
        targets: names in the model -> modules of the layer.
        run: runs the layer on some inputs.
    """
    seen: list[_Seen] = []
    # a target, its input and the version of that, its output, how many tensors were seen before it
    ran: list[tuple[str, torch.Tensor | None, int, Any, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            for value in (*args[:1], kwargs.get("hidden_states")):
                if isinstance(value, torch.Tensor) and not any(value is each.tensor for each in seen):
                    seen.append(_Seen(name, value))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            number = version(given) if isinstance(given, torch.Tensor) else -1
            ran.append((name, given, number, output, len(seen)))

        return hook

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            stack.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        output = run()
    steps: list[Step] = []
    inputs: list[tuple[torch.Tensor | None, int]] = []
    times = Counter(name for name, *_ in ran)
    alone = {name for name in times if times[name] > 1 or is_experts(targets[name])}
    for name, given, number, put_out, before in ran:
        if any(name in step.names for step in steps):
            continue  # runs more than once
        # one that was written into meanwhile is another input
        same_input = (i for i, (tensor, then) in enumerate(inputs) if tensor is given and then == number)
        known = next((i for i in same_input if steps[i].names[0] not in alone), None)
        if known is None or name in alone:
            steps.append(Step([name], repeats=times[name] > 1))
            inputs.append((given, number))
        else:
            steps[known].names.append(name)
        if isinstance(put_out, torch.Tensor) and times[name] == 1:
            later = [each.tensor for each in seen[before:]] + [output]
            same = [each for each in seen[:before] if each.tensor.shape == put_out.shape]
            found = next((e.name for e in same if any(_is_sum(t, e.tensor, put_out) for t in later)), None)
            if found is not None:
                step = next(step for step in steps if name in step.names)
                step.residual[name] = found
    left = [name for name in targets if not any(name in step.names for step in steps)]
    return [*steps, *(Step([name]) for name in left)]  # those that the inputs did not reach


def _is_sum(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
    if total.shape != other.shape or total.dtype != other.dtype or not total.numel():
        return False  # of no tokens (Higgs Audio's on text) everything is equal
    return torch.equal(total, one + other)


def sharing_weights(layer: nn.Module) -> nn.Module:
    """Another layer of the same parameters and buffers: what is binarized in one stays float in the other."""
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in chain(layer.parameters(), layer.buffers())})


@dataclass
class Read:
    """What a run of a layer up to a step came to.

    Attributes:
        input: `x` `[..., K]` of the step's linears; None where the run did not reach them, and of experts.
        streams: residual streams by the names of `Step.residual`.
    """

    input: torch.Tensor | None = None
    streams: dict[str, torch.Tensor] = field(default_factory=dict)


class _Run(AbstractContextManager[Read]):
    """Not made of a generator: one that swallows an exception is part of the traceback, and in Python 3.12 holds who
    threw it into it, and so the exception: a 7B's calibration kept 2 GB a layer on the GPU in such cycles.
    """

    def __init__(self, local: threading.local):
        self._local = local

    def __enter__(self) -> Read:
        self._local.found = found = Read()
        return found

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> bool:
        del self._local.found
        return kind is not None and issubclass(kind, Stop)


class Reading:
    """Takes down what a step receives, and the residual streams that it adds to, while a layer runs inside `reading`.

    The tensors are those of the run itself: `find_steps` has seen that a stream is not written into, and nothing
    follows the input where the run ends there.

    Args:
        layer: the layer.
        prefix: its name in the model.
        step: of which linears.
        whole: whether the layer runs to its end; otherwise `Stop` is raised where the step would begin.
    """

    def __init__(self, layer: nn.Module, prefix: str, step: Step, whole: bool):
        self._local = threading.local()
        self._handles = []
        self._whole = whole
        for source in set(step.residual.values()):
            module = layer.get_submodule(source) if source != LAYER_INPUT else layer
            self._handles.append(module.register_forward_pre_hook(self._stream(source), with_kwargs=True))
        first = layer.get_submodule(step.names[0].removeprefix(prefix + "."))
        self._handles.append(first.register_forward_pre_hook(self._begin))

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def reading(self) -> AbstractContextManager[Read]:
        """A context of one run, of this thread: what the run has; filled when it is over."""
        return _Run(self._local)

    def _begin(self, module: nn.Module, args: tuple) -> None:
        found = self._local.found
        if not is_experts(module) and found.input is None:
            found.input = args[0].detach().clone() if self._whole else args[0].detach()
        if not self._whole:
            raise Stop

    def _stream(self, source: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found = self._local.found
            if found.input is None:  # behind the step, a norm of several branches receives another stream
                found.streams[source] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook
