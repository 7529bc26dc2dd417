"""What a submodule of a layer puts out is kept once it cannot change any more, so that it need not run again.

With error correction a layer runs once for each of its steps, and once more for the next layer's inputs. A Llama's
attention would run seven times a batch: in the float layer and in the one that is binarized for each of three steps,
then once more. But it changes for the last time when its `o_proj` is binarized. In that step the input of `o_proj` is
at hand, and from it the output of attention is one product. So that is kept, and attention runs twice.

That a submodule puts out what a linear does is seen in a run: it is the very same tensor. Where it is not, because
something follows the linear, what the submodule puts out is kept the first time it runs with all its linears
binarized. Either way the same operations get the same numbers: no bit of the result changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .activations import Activations, CopiedAhead, OnDevice
from .calls import like, replaced_forwards
from .memory import free_on
from .reading import Step

# What is kept of a layer takes at most this many times the memory of the hidden states. Attention's output is one of
# them; the input of `o_proj` is larger where there are more heads than hidden features (1.6 times in Qwen3-4B).
KEPT_HIDDEN = 2
# Bytes of larger tensors that are kept all the same, on the device: the input of `down_proj`, of which 32 x 1024 tokens
# of SmolLM2-135M take 201 MB and 128 x 2048 of a 7B, 5.8 GB, on each of two GPUs half of that. On a GPU no more than a
# quarter of what is free: elsewhere they would be no sooner copied than computed again.
LARGEST = 1 << 30
LARGEST_ON_GPU = 4 << 30


@dataclass(frozen=True)
class Settled:
    """A submodule of a layer that puts out the same again once its last linear is binarized.

    Attributes:
        name: of the submodule in the layer.
        last: the number, from 1, of the step in which the last of its linears is binarized.
        linear: the name in the layer of the linear of that step whose output it puts out; None where there is none.
        form: its output, with None in place of the tensor.
        bytes: of the larger of the linear's input and its output, in one batch.
        until: the last run, from 1, in which what is kept is used; the one for the next layer's inputs follows the
            last step's.
        on_device: whether it is kept where it was computed, and not with the hidden states.
    """

    name: str
    last: int
    linear: str | None
    form: Any
    bytes: int
    until: int = 0
    on_device: bool = False


@dataclass
class _Ran:
    """A module's run: how often it ran, its only argument, its output, and the output's version then."""

    times: int
    given: torch.Tensor | None
    output: Any
    tensor: torch.Tensor | None
    version: int


class Outputs:
    """What the modules put out that hold linears, and the linears, while a layer runs once inside this context.

    Args:
        layer: the layer.
        names: of its linears in the layer.
    """

    def __init__(self, layer: nn.Module, names: Collection[str]):
        self._ran: dict[str, _Ran] = {}
        self._modules = {
            name: module
            for name, module in layer.named_modules()
            if name and (name in names or any(other.startswith(name + ".") for other in names))
        }
        self._targets = list(names)
        self._handles: list = []

    def __enter__(self) -> Outputs:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._note(name), with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            times = self._ran[name].times + 1 if name in self._ran else 1
            given = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) else None
            tensor = _only_tensor(output)
            version = -1 if tensor is None else tensor._version
            self._ran[name] = _Ran(times, given, output, tensor, version)

        return hook

    def settled(self, prefix: str, steps: Sequence[Step]) -> list[Settled]:
        """The submodules whose outputs may be kept, the outer ones first. What was seen is let go.

        Args:
            prefix: the layer's name in the model.
            steps: of the layer.
        """
        ran, self._ran = self._ran, {}
        number = {name.removeprefix(prefix + "."): n for n, step in enumerate(steps, 1) for name in step.names}
        streams = {source for step in steps for source in step.residual.values()}
        found = []
        for name in self._modules:
            inside = [target for target in self._targets if target.startswith(name + ".")]
            seen = ran.get(name)
            if not inside or seen is None or seen.times > 1 or seen.tensor is None:
                continue
            # written into later, or of another form in memory than its copy
            if seen.tensor._version != seen.version or not seen.tensor.is_contiguous():
                continue
            if any(source.startswith(name + ".") for source in streams):
                continue  # is read inside in later runs
            last = max(number[target] for target in inside)
            size, linear = seen.tensor.nbytes, None
            for target in inside:
                own = ran.get(target)
                if own is None or own.tensor is not seen.tensor or own.times > 1 or number[target] != last:
                    continue
                if own.given is not None and own.given.is_contiguous():
                    linear, size = target, max(size, own.given.nbytes)
            found.append(Settled(name, last, linear, like(seen.output, None), size))
        return found


def _only_tensor(output: Any) -> torch.Tensor | None:
    """The tensor that a module returns, by itself or in front of nothing else; None where it returns anything else."""
    if type(output) in (tuple, list) and output and all(other is None for other in output[1:]):
        output = output[0]
    return output if type(output) is torch.Tensor and not output.is_inference() else None


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where a larger one would be kept with it."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def worth_keeping(
    settled: Sequence[Settled], runs: int, hidden: int, batches: int, device: torch.device
) -> list[Settled]:
    """Those that save a run, with the last run in which each is used, as far as memory allows.

    Args:
        settled: of the layer, the outer ones first.
        runs: how often the layer runs.
        hidden: bytes of its hidden states in one batch.
        batches: how many there are.
        device: where it runs.
    """
    chosen: list[Settled] = []
    left = KEPT_HIDDEN * hidden
    large = largest(device)
    for each in settled:
        until = min([runs, *(outer.last for outer in chosen if each.name.startswith(outer.name + "."))])
        if each.last + (1 if each.linear is not None else 2) > until:
            continue
        on_device = each.bytes > left
        if not on_device:
            left -= each.bytes
        elif each.bytes * batches <= large:
            large -= each.bytes * batches
        else:
            continue
        chosen.append(replace(each, until=until, on_device=on_device))
    return chosen


def largest(device: torch.device) -> int:
    """Bytes of all batches that may be kept on a device beside what takes no more than hidden states."""
    if device.type == "cuda":
        return min(LARGEST_ON_GPU, free_on(device) // 4)
    return LARGEST if device.type == "cpu" else 0


class Reuse:
    """Keeps what submodules of a layer put out, from one of its runs to the next.

    Args:
        layer: the layer.
        settled: what `worth_keeping` has chosen.
        device: where the layer is.
    """

    def __init__(self, layer: nn.Module, settled: Sequence[Settled], device: torch.device):
        self._layer = layer
        self._settled = settled
        self._device = device
        self._kept = {each.name: OnDevice() if each.on_device else Activations() for each in settled}
        # the batches of which there is the output, not the linear's input
        self._outputs: dict[str, set[int]] = {each.name: set() for each in settled}
        self._run = 0
        self._local = threading.local()

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        """Within, the layer runs with all batches for the time of this number; settled submodules do not."""
        self._run = number
        active = [each for each in self._settled if each.last < number <= each.until]
        modules = [self._layer.get_submodule(each.name) for each in active]
        forwards = [self._forward(each, module.forward) for each, module in zip(active, modules, strict=True)]
        try:
            with replaced_forwards(modules, forwards):
                yield
        finally:
            for each in self._settled:
                if each.until <= number:
                    self._kept[each.name].clear()

    @contextmanager
    def batch(self, batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Within, this thread runs the layer with this batch. Yields: outputs to `keep`; filled when the run is
        over."""
        self._local.batch, self._local.made = batch, {}
        try:
            yield self._local.made
        finally:
            del self._local.batch, self._local.made

    def keep(self, batch: int, made: Mapping[str, torch.Tensor], given: torch.Tensor | None = None) -> None:
        """Keeps what a run came to; to be called in the order of the batches.

        Args:
            batch: its number.
            made: from `batch`.
            given: the input of the step's linears.
        """
        for each in self._settled:
            kept = self._kept[each.name]
            if batch > len(kept):
                continue  # a submodule that does not run with every batch, an expert: from there on it runs itself
            if each.name in made:
                kept.put(batch, _alone(made[each.name]))
                self._outputs[each.name].add(batch)
            elif each.last == self._run and each.linear is not None and given is not None:
                kept.put(batch, _alone(given))

    def _forward(self, settled: Settled, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept, outputs = self._kept[settled.name], self._outputs[settled.name]
        away = self._device.type == "cuda" and not settled.on_device
        ahead = CopiedAhead(kept, len(kept), self._device) if away else None
        linear = None if settled.linear is None else self._layer.get_submodule(settled.linear)
        again = self._run < settled.until

        def on_device(batch: int) -> torch.Tensor:
            return kept[batch].to(self._device) if ahead is None else ahead[batch]

        def kept_forward(*args: Any, **kwargs: Any) -> Any:
            batch = self._local.batch
            if batch in outputs:
                return like(settled.form, on_device(batch))
            if linear is not None and batch < len(kept):
                result = linear(on_device(batch))
                found = like(settled.form, result)
            else:
                found = forward(*args, **kwargs)
                result = _only_tensor(found)
            if again and result is not None:
                self._local.made[settled.name] = result
            return found

        return kept_forward
