"""What a linear has to make up for: the errors of what was binarized before it.

By the time a linear is binarized, its inputs are no longer those of the float model, and in the residual stream, to
which it adds, there is an error already. Fitted to the float weight `W` it would hand all of that on. So it is fitted
to the weight that comes closest, on the inputs `x` which it really gets, to what would put things right:

    T = argmin  sum |T x - (W x + s d)|^2 + damping |T - W|^2  =  W + s (sum d x^T) (H + damping I)^-1,   H = sum x x^T

`d` is what the float model's linear puts out less what this one, still float, puts out; where the linear's output is
added to the residual stream, `d` also has what the float model's stream there has and this one has not. `s`, the
strength, is below one because calibration tokens are few.

That inputs differ is taken into account by "asymmetric calibration" (GPTAQ, arXiv 2504.02692) and by QEP (arXiv
2504.09629, whose strength `s` is); the error of the residual stream is the part that is new here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..experts.matrices import is_experts
from ..modules import linear_shape
from .calls import Stop

# of the mean diagonal of H; see docs/method.md
DAMPING = 0.1

# Where a residual stream is read: at the layer's own input.
LAYER_INPUT = ""


@dataclass(frozen=True)
class Step:
    """Modules of a layer that receive the same input and are binarized together.

    Attributes:
        names: of the modules in the model.
        residual: name of a linear -> the submodule of the layer whose input, with the linear's output, is the residual
            stream behind it; `LAYER_INPUT` is the layer itself.
    """

    names: list[str]
    residual: dict[str, str] = field(default_factory=dict)


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
    ran: list[
        tuple[str, torch.Tensor | None, Any, int]
    ] = []  # target, its input, its output, how much was seen before it

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            for value in (*args[:1], kwargs.get("hidden_states")):
                if isinstance(value, torch.Tensor) and not any(value is each.tensor for each in seen):
                    seen.append(_Seen(name, value))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            ran.append((name, given, output, len(seen)))

        return hook

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            stack.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        output = run()
    steps: list[Step] = []
    inputs: list[torch.Tensor | None] = []
    for name, given, put_out, before in ran:
        known = next((index for index, tensor in enumerate(inputs) if tensor is given), None)
        if any(name in step.names for step in steps):
            continue  # runs more than once
        if known is None or is_experts(targets[name]) or any(is_experts(targets[n]) for n in steps[known].names):
            steps.append(Step([name]))
            inputs.append(given)
        else:
            steps[known].names.append(name)
        if isinstance(put_out, torch.Tensor):
            later = [each.tensor for each in seen[before:]] + [output]
            same = [each for each in seen[:before] if each.tensor.shape == put_out.shape]
            found = next((e.name for e in same if any(_is_sum(t, e.tensor, put_out) for t in later)), None)
            if found is not None:
                step = next(step for step in steps if name in step.names)
                step.residual[name] = found
    left = [name for name in targets if not any(name in step.names for step in steps)]
    return [*steps, *(Step([name]) for name in left)]  # those that the inputs did not reach


def _is_sum(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
    return total.shape == other.shape and total.dtype == other.dtype and torch.equal(total, one + other)


def sharing_weights(layer: nn.Module) -> nn.Module:
    """Another layer of the same parameters and buffers: what is binarized in one stays float in the other."""
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in chain(layer.parameters(), layer.buffers())})


class Reading:
    """Takes down what a layer's linears put out, and its residual streams, while the layer runs inside `reading`.

    Args:
        layer: the layer.
        prefix: its name in the model.
        step: of which linears.
        whole: whether the layer runs to its end; otherwise `Stop` is raised behind the step's last module.
    """

    def __init__(self, layer: nn.Module, prefix: str, step: Step, whole: bool):
        self._local = threading.local()
        self._handles = []
        own = {name: layer.get_submodule(name.removeprefix(prefix + ".")) for name in step.names}
        self._waiting = set(own)
        self._whole = whole
        for name, module in own.items():
            self._handles.append(module.register_forward_hook(self._output(name)))
        for source in set(step.residual.values()):
            module = layer.get_submodule(source) if source != LAYER_INPUT else layer
            self._handles.append(module.register_forward_pre_hook(self._stream(source), with_kwargs=True))

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def reading(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """Yields: what this thread's run has by name of a linear, and by name of a stream; filled when it is over."""
        found: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        self._local.found, self._local.ran = found, set()
        try:
            yield found
        except Stop:
            pass
        finally:
            del self._local.found

    def _output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self._local.found[0][name] = output.detach().clone()
            self._local.ran.add(name)
            if not self._whole and self._local.ran == self._waiting:
                raise Stop

        return hook

    def _stream(self, source: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            self._local.found[1][source] = value.detach().clone()

        return hook


class Corrections:
    """`sum d x^T` of each linear of a step, in float64 for the reason that `Statistic` gives.

    Args:
        step: the step.
        modules: name -> float module.
        device: where they are.
    """

    def __init__(self, step: Step, modules: Mapping[str, nn.Module], device: torch.device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._residual = step.residual
        self.sums = {
            name: torch.zeros(linear_shape(modules[name]), dtype=wide, device=device)
            for name in step.names
            if not is_experts(modules[name])
        }

    def differences(
        self,
        wanted: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
        found: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """`d` `[..., N]`, float32, of one batch, by name of a linear.

        Args:
            wanted: what `Reading.reading` gave for the float layer on the float model's inputs.
            found: the same of the layer that is binarized.
        """
        result = {}
        for name, output in found[0].items():
            difference = wanted[0][name].float() - output.float()
            if (stream := self._residual.get(name)) is not None:
                difference += wanted[1][stream].float() - found[1][stream].float()
            result[name] = difference
        return result

    def add(self, differences: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        """Adds the products of one batch; `inputs` are the `x` `[..., K]` by name of a linear."""
        for name, difference in differences.items():
            if name in self.sums and name in inputs:
                rows = inputs[name].detach().reshape(-1, inputs[name].shape[-1]).float()
                with torch.autocast(rows.device.type, enabled=False):
                    self.sums[name] += difference.reshape(-1, difference.shape[-1]).T @ rows


@torch.no_grad()
def corrected(module: nn.Module, hessian: torch.Tensor, correction: torch.Tensor, strength: float) -> nn.Module:
    """The float linear with the weight `T` of the equation above, in float32, beside the one that is given.

    Args:
        module: an `nn.Linear` or `Conv1D`.
        hessian: H `[K, K]`.
        correction: `sum d x^T` `[N, K]`.
        strength: s.
    """
    mean = float(hessian.diagonal().double().mean())
    if not mean > 0 or not torch.isfinite(correction).all() or not correction.any():
        return module
    wide = correction.dtype
    damped = hessian.to(wide, copy=True)
    damped.diagonal().add_(DAMPING * mean)
    change = torch.linalg.solve(damped, correction.T).T * strength
    result = copy.copy(module)
    result._parameters = dict(module._parameters)
    weight = module.get_parameter("weight")
    change = change.T if type(module) is Conv1D else change
    result._parameters["weight"] = nn.Parameter((weight.to(wide) + change).float(), requires_grad=False)
    return result
