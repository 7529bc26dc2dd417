"""Which rank runs the float model's next layer with which batch, while others fit (`ahead`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ..experts.matrices import is_experts
from ..modules import linear_shape
from .calls import Call
from .memory import free_on
from .ranks import Ranks
from .reading import LAYER_INPUT, Step

# Bytes that a rank may hold of the next layer, by the kind of device, and no more than a third of what is free; none on
# others. Of 128 x 2048 tokens the one of two ranks that waits holds 16.5 GB of a 7B and 36.5 of a 70B, the other one
# half of that. On a CPU memory counts, and between hosts it would take longer to send than to compute.
MOST: dict[str, int] = {"cuda": 48 << 30}

Key = tuple[int, int]  # the rank that has a batch, and the number of the batch there


@dataclass
class Following:
    """The layer behind the one that is binarized.

    Attributes:
        name: of the layer.
        layer: the layer, float.
        targets: names of what is to be binarized in it.
        calls: its arguments, batch by batch; of batches that it need not be run with, the last ones, not.
        to_end: whether what it puts out is wanted.
        load: brings its weights to the device, where it did not do so before.
    """

    name: str
    layer: nn.Module
    targets: list[str]
    calls: list[Call]
    to_end: bool
    load: Callable[[], None]


@dataclass
class Plan:
    """The same on all ranks.

    Attributes:
        steps: of the layer, as they are expected.
        kept: of which steps, by their numbers from 1, the part of the run is kept.
        runners: of a batch -> the rank that runs it.
        calls: of each rank, batch by batch, what tells calls apart; None where that cannot be told.
    """

    steps: list[Step]
    kept: dict[int, Step]
    runners: dict[Key, int]
    calls: list[list[str | None]]


@dataclass(frozen=True)
class Pace:
    """What it took a rank the last time.

    Attributes:
        fit: seconds of its fits, if it had any.
        batch: seconds of a batch that it ran meanwhile.
    """

    fit: float | None = None
    batch: float | None = None


@dataclass
class _Offer:
    """What a rank says of its part: of its batches the calls and the bytes of each, and what it has room for."""

    calls: list[str | None]
    size: int
    room: int
    pace: Pace = field(default_factory=Pace)


def make_plan(
    ranks: Ranks,
    device: torch.device,
    name: str,
    steps: Sequence[Step],
    modules: Mapping[str, nn.Module],
    following: Following | None,
    hidden: torch.Tensor | None,
    pace: Pace,
) -> Plan | None:
    """What can be run ahead while the last step of a layer is fitted; None if nothing. All ranks call it.

    Args:
        ranks: all of them.
        device: of this rank.
        name: of the layer that is binarized.
        steps: its steps.
        modules: its modules by their names.
        following: the layer behind it, on all ranks or on none.
        hidden: hidden states of a batch of this rank, if it has any.
        pace: of this rank, in the layer before.
    """
    if following is None or ranks.size == 1 or not ranks.one_host or not MOST.get(device.type) or len(steps) < 2:
        return None
    last = {target: modules[target] for target in steps[-1].names}
    fitting = set(ranks.owners(last).values())
    if len(fitting) == ranks.size or any(is_experts(module) for module in last.values()):
        return None  # nobody waits
    expected = _expected(name, steps, following)
    if expected is None:
        return None
    kept = {number: step for number, step in enumerate(expected, 1) if _is_kept(number, step, following)}
    if not kept and not following.to_end:
        return None
    known: dict[int, str] = {}
    size = 0 if hidden is None else _bytes(kept.values(), following, hidden)
    offer = _Offer([_told(call, known) for call in following.calls], size, _room(device), pace)
    offers = ranks.exchange(offer, "planning to run a layer ahead")
    runners = divided(offers, [rank for rank in range(ranks.size) if rank not in fitting], in_time(offers))
    return Plan(expected, kept, runners, [offer.calls for offer in offers]) if runners else None


def _expected(name: str, steps: Sequence[Step], following: Following) -> list[Step] | None:
    """The steps of a layer that is like the one before it; None where it has other modules."""

    def there(target: str) -> str:
        return following.name + target.removeprefix(name)

    expected = [
        replace(
            step,
            names=[there(target) for target in step.names],
            residual={there(target): source for target, source in step.residual.items()},
        )
        for step in steps
    ]
    if sorted(target for step in expected for target in step.names) != sorted(following.targets):
        return None
    streams = {source for step in expected for source in step.residual.values()} - {LAYER_INPUT}
    return expected if streams <= dict(following.layer.named_modules()).keys() else None


def _first(step: Step, following: Following) -> nn.Module:
    return following.layer.get_submodule(step.names[0].removeprefix(following.name + "."))


def _is_kept(number: int, step: Step, following: Following) -> bool:
    """Not of the first step, up to which there is little to run, and not where nothing is corrected."""
    return number > 1 and not step.repeats and not is_experts(_first(step, following))


def _bytes(kept: Collection[Step], following: Following, hidden: torch.Tensor) -> int:
    """Of a batch: its input, its output if it is wanted, the residual streams and the inputs of the steps."""
    width = hidden.shape[-1]
    streams = {source for step in kept for source in step.residual.values()} - {LAYER_INPUT}
    features = (1 + following.to_end + len(streams)) * width + sum(
        linear_shape(_first(step, following))[1] for step in kept
    )
    return hidden.nbytes // width * features


def _room(device: torch.device) -> int:
    most = MOST[device.type]
    return min(most, free_on(device) // 3) if device.type == "cuda" else most


def _told(call: Call, known: dict[int, str]) -> str | None:
    """The same for calls that are the same, on whichever rank; None where that cannot be told.

    Args:
        call: the call.
        known: of tensors that were met before, by their ids.
    """
    leaves, form = tree_flatten((call.args, call.kwargs))
    said = [str(form)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in known:
                values = leaf.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
                digest = hashlib.sha256(values.numpy().data).hexdigest()
                known[id(leaf)] = f"{leaf.dtype} {tuple(leaf.shape)} {leaf.stride()} {digest}"
            said.append(known[id(leaf)])
        elif leaf is None or type(leaf) in (bool, int, float, str):
            said.append(repr(leaf))
        else:
            return None
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def in_time(offers: Sequence[_Offer]) -> list[float]:
    """How many batches each rank can run while others fit, one at least, as far as it is known.

    What is run beyond that is waited for, and saves each of two ranks half of it. The bits do not depend on it.
    """
    fits = [offer.pace.fit for offer in offers if offer.pace.fit is not None]
    each = [offer.pace.batch for offer in offers]
    return [max(1.0, max(fits) // batch) if batch and fits else math.inf for batch in each]


def divided(offers: Sequence[_Offer], waiting: Collection[int], most: Sequence[float]) -> dict[Key, int]:
    """Which of the ranks that wait runs which batch: its own, and of the others' those that it has a like call for.

    As far as there is room and time, from the last batches on: what a layer keeps from one of its steps to the next are
    the first ones (`Reuse.keep`).

    Args:
        offers: of all ranks.
        waiting: the ranks that do.
        most: how many batches each can run.
    """
    held, load = [0] * len(offers), [0] * len(offers)
    runners: dict[Key, int] = {}
    left = {rank: len(offer.calls) for rank, offer in enumerate(offers)}  # batches of a rank that may follow
    while any(left.values()):
        for rank, offer in enumerate(offers):
            if not left[rank]:
                continue
            call = offer.calls[left[rank] - 1]
            able = [each for each in waiting if each == rank or (call is not None and call in offers[each].calls)]
            runner = rank if rank in able else min(able, key=load.__getitem__, default=None)
            if (
                runner is None
                or load[runner] >= most[runner]
                or any(held[each] + offer.size > offers[each].room for each in {rank, runner})
            ):
                left[rank] = 0
                continue
            left[rank] -= 1
            runners[rank, left[rank]] = runner
            load[runner] += 1
            for each in {rank, runner}:
                held[each] += offer.size
    return dict(sorted(runners.items()))
