"""Tuning of what a module holds of binarized linears, norms and biases, for any loss of a batch, by Adam.

A part of the batches is held out. What is best on them stays, and nothing where nothing is better than before.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..nn import ARBExperts, ARBLinear
from ..result import Result
from .trainable import Trainable, trainable

WARMUP = 10  # steps in which the learning rates rise: Adam's first steps know the gradient's size from one batch
LEAST_SIZE = 1e-3  # of a tensor, for its learning rate: biases may begin at zero
BETAS = (0.9, 0.95)
# Where the held-out loss does not fall, training goes on from the best state with rates divided by BACKOFF, down to
# LEAST_RATE of them. Without, the last pass over SmolLM2-135M at one plane (1.08 bits) was given up at 0.605 nats.
BACKOFF, LEAST_RATE = 4.0, 1 / 16


@dataclass(frozen=True)
class RefineSettings:
    """How a layer is tuned.

    Attributes:
        steps: steps of Adam, one calibration batch each.
        learning_rate: of scales, norms and biases, relative to their sizes; it rises for 10 steps and falls to zero as
            a cosine.
        sign_learning_rate: the same of the latents of the signs, relative to the latent of a sign whose weight is
            fitted exactly; 0 leaves the signs as they are.
        evaluations: how often the held-out loss is looked at.
        patience: evaluations without a new best after which the rates fall, in the end a layer is left.
        held_out: fraction of the calibration batches that are not trained on, at least one.
        seed: of the order of the batches.
    """

    steps: int = 120
    learning_rate: float = 0.005
    sign_learning_rate: float = 0.005
    evaluations: int = 10
    patience: int = 3
    held_out: float = 0.125
    seed: int = 0


@dataclass(frozen=True)
class Refinement(Result):
    """What tuning did. Losses are those of the held-out batches: squared error over the squared target, or nats.

    Attributes:
        before: loss of what was binarized.
        after: loss of what is stored now, scales rounded; never more than `before`.
        unrounded: loss of the best state before its scales were rounded.
        steps: steps taken.
        flipped: fraction of the signs that changed.
        seconds: wall time.
    """

    before: float
    after: float
    steps: int
    flipped: float
    seconds: float
    unrounded: float


def tune(
    module: nn.Module,
    twins: dict[str, Trainable],
    loss: Callable[[int], torch.Tensor],
    train: Sequence[int],
    held: Sequence[int],
    settings: RefineSettings,
    name: str,
    stored: dict[int, torch.dtype],
) -> Refinement:
    """Trains the twins in a module and the module's norms and biases; what is best on the held-out batches stays.

    Args:
        module: its parameters of at most one dimension are trained, beside those of the twins.
        twins: what stands in the module for its binarized linears.
        loss: the loss of a calibration batch, with gradients.
        train, held: numbers of the batches to train on and of those held out.
        settings: how.
        name: of the module, for errors.
        stored: id of a parameter -> the dtype in which it will be stored.

    Raises:
        ValueError: the held-out loss is not finite to begin with.
    """
    start = time.perf_counter()
    scales = [scale for twin in twins.values() for scale in twin.scales()]
    small = [p for p in module.parameters() if p.ndim <= 1 and p.is_floating_point()]
    latents = [latent for twin in twins.values() for latent in twin.latents]
    continuous = list({id(p): p for p in (*scales, *small)}.values())
    trained = [*continuous, *latents]

    @torch.no_grad()
    def held_out() -> float:
        return float(sum(loss(batch).double() for batch in held)) / len(held)

    before = best = held_out()
    if not math.isfinite(before):
        raise ValueError(
            f"{name}: its outputs cannot be refined, the squared error is {before}. Load the model in another dtype "
            "(float32 or bfloat16 instead of float16), or set refine=None."
        )
    first = [p.detach().clone() for p in small]
    kept = [p.detach().clone() for p in trained]
    signs = [plane for twin in twins.values() for plane in twin.current_signs()]
    steps = [_Steps(p) for p in continuous]
    groups = [{"params": [step.taken for step in steps], "lr": settings.learning_rate}]
    groups += [{"params": latents, "lr": settings.sign_learning_rate}] if latents else []
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    rate = 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate * _rate(step, settings.steps))
    every = max(1, settings.steps // settings.evaluations)
    order: list[int] = []
    shuffle = random.Random(settings.seed)
    waited = taken = 0
    with only_these_require_grad(module, trained):
        for taken in range(1, settings.steps + 1):
            if not order:
                order = list(train)
                shuffle.shuffle(order)
            with torch.enable_grad():
                value = loss(order.pop())
                # None for a parameter that no token of the batch reached
                gradients = torch.autograd.grad(value, trained, allow_unused=True)
            reached = [gradient for gradient in gradients if gradient is not None]
            if not reached or not math.isfinite(float(torch.nn.utils.get_total_norm(reached))):
                break  # what was best so far stays
            for step, gradient in zip(steps, gradients, strict=False):
                step.taken.grad = None if gradient is None else gradient * step.size
            for latent, gradient in zip(latents, gradients[len(continuous) :], strict=True):
                latent.grad = gradient
            optimizer.step()
            schedule.step()
            for step in steps:
                step.apply()
            if taken % every and taken != settings.steps:
                continue
            now = held_out()
            if now < best:
                best, waited = now, 0
                for copy, parameter in zip(kept, trained, strict=True):
                    copy.copy_(parameter.detach())
                continue
            waited += 1
            if waited < settings.patience:
                continue
            if rate <= LEAST_RATE:
                break
            rate, waited = rate / BACKOFF, 0
            with torch.no_grad():
                for copy, parameter in zip(kept, trained, strict=True):
                    parameter.copy_(copy)
            for step in steps:
                step.restart()
            optimizer.state.clear()
    with torch.no_grad():
        for copy, parameter in zip(kept, trained, strict=True):
            parameter.grad = None
            parameter.copy_(copy)
        for twin in twins.values():
            twin.round_scales()
        for parameter in small:
            parameter.copy_(parameter.to(stored.get(id(parameter), parameter.dtype)))
    after = held_out()
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(small, first, strict=True):
                parameter.copy_(value)
        return Refinement(before, before, taken, 0.0, time.perf_counter() - start, best)
    now_signs = [plane for twin in twins.values() for plane in twin.current_signs()]
    changed = sum(int((old != new).sum()) for old, new in zip(signs, now_signs, strict=True))
    for twin in twins.values():
        twin.write_back()
    total = sum(plane.numel() for plane in signs)
    return Refinement(before, after, taken, changed / max(total, 1), time.perf_counter() - start, best)


def split_batches(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on and of those held out, which are spread evenly.

    Raises:
        ValueError: fewer than two batches.
    """
    if count < 2:
        raise ValueError(
            "refine needs at least two calibration batches, of which one is held out: set a smaller batch_size, or a "
            "larger num_samples."
        )
    out = min(max(1, round(count * fraction)), count // 2)
    held = sorted({int((i + 0.5) * count / out) for i in range(out)})
    return [batch for batch in range(count) if batch not in held], held


@contextmanager
def computing_in_float32(module: nn.Module) -> Iterator[dict[int, torch.dtype]]:
    """Float parameters and buffers are float32 inside this context, but for packed ones, and as before behind it.

    Yields:
        id of a tensor that was cast -> its dtype.
    """
    packed: set[int] = set()
    for part in module.modules():
        if isinstance(part, ARBLinear):
            packed |= {id(p) for key, p in part.named_parameters(recurse=False) if key != "bias"}
        elif isinstance(part, ARBExperts):
            packed |= {id(part.get_parameter(key)) for key in part.packed_names()}
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    cast = {
        key: t for key, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32 and key not in packed
    }
    dtypes = {key: t.dtype for key, t in cast.items()}
    try:
        for tensor in cast.values():
            tensor.data = tensor.data.float()
        yield dtypes
    finally:
        for key, tensor in cast.items():
            tensor.data = tensor.data.to(dtypes[key])


@contextmanager
def swapped(module: nn.Module, train_signs: bool) -> Iterator[dict[str, Trainable]]:
    """Binarized linears are replaced by their trainable twins inside this context.

    Yields:
        name in the module -> twin.
    """
    found = {name: part for name, part in module.named_modules() if isinstance(part, ARBLinear) and name}
    twins = {name: trainable(part, train_signs) for name, part in found.items()}
    try:
        for name, twin in twins.items():
            module.set_submodule(name, twin)
        yield twins
    finally:
        for name, part in found.items():
            module.set_submodule(name, part)


@contextmanager
def only_these_require_grad(module: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside this context no other parameter of the module asks for a gradient."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)


class _Steps:
    """A parameter as `first + size * taken`, of which Adam trains the last: its steps are relative to the size, the
    root mean square of the tensor.

    Args:
        parameter: float32.
    """

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.first = parameter.detach().clone()
        size = self.first.square().mean().sqrt().clamp_min(LEAST_SIZE)
        self.size = torch.nan_to_num(size, 1.0)  # of a tensor without elements
        self.taken = nn.Parameter(torch.zeros_like(self.first))

    @torch.no_grad()
    def restart(self) -> None:
        """Takes the parameter as it is for the first one."""
        self.first.copy_(self.parameter)
        self.taken.zero_()

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the parameter its value."""
        self.parameter.copy_(self.first + self.size * self.taken)


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step over the highest: a linear rise, then half a cosine."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
