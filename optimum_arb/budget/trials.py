"""`target_bits_per_weight`: which linear gets how many planes, or which rank, within a budget of stored bits.

Each linear is binarized for a trial in a few of the forms that it may get, under the calibration matrix of the float
model, with a third of the iterations. By what each form does to the divergence of the model's distribution
(`calibration/sensitivity.py`) the budget is divided: `optimum_arb.budget.allocation`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import is_progress_bar_enabled

from ..algorithms.partition import MAX_SALIENT
from ..calibration.sensitivity import divergences
from ..calibration.walk import CalibrationWalk
from ..config import ARBConfig
from ..config.choices import AUTO
from ..config.overrides import with_choices
from ..conversion import binarize_linear
from ..format.layout import MAX_PLANES
from ..modules import Selection, linear_shape
from ..nn import ARBLinear
from ..patterns import matches
from .allocation import Choice, allocate, interpolate

# Of the divergence that a linear causes, before linears are compared: error correction lets later linears make up for
# earlier ones, so that the differences between them are smaller in the end.
TEMPER = 0.5
# How far the bits of a linear may be from the target, as a factor. At two planes it lets in one and three.
SPREAD = {"arb-hrc": 2.5, "arb-dbf": 2.0}
# Sizes of the factors that are tried, of the target; those between are interpolated.
TRIED = (0.6, 1.0, 1.6)
STEPS = 48  # sizes of factors to choose from
SEQUENCES = 16  # that the model runs on, forth and back
EFFORT = 3  # of the iterations of a fit, a trial has one in so many


@dataclass(frozen=True)
class Candidate:
    """A form that a linear may get.

    Attributes:
        settings: what `overrides` say of it.
        bits: that it stores.
        kind: candidates of the same kind have an error that falls smoothly with the bits.
        tried: whether it is fitted for a trial.
    """

    settings: Mapping[str, Any]
    bits: int
    kind: str
    tried: bool


def stored_bits(config: ARBConfig, rows: int, columns: int, wide: Collection[str] = ()) -> int:
    """All bits that a linear `[rows, columns]` stores with these choices; at most, where salient columns are searched
    for. Scales are in the dtype that is asked for, those named in `wide` in float32."""
    index = 16 if columns <= 2**15 else 32
    sizes = {"scale": config.resolved_scale_bits, "scale_grid": 32, "permutation": index, "salient_columns": index}
    width = columns if config.block_size == -1 else config.block_size
    chosen = config.resolved_salient_columns
    most = MAX_SALIENT if chosen == "search" else int(chosen)
    salient = sum(min(most, min(width, columns - start) - 1) for start in range(0, columns, width))
    shapes = config.stored_shapes(rows, columns, config.resolved_act_order, salient)
    sizes |= dict.fromkeys(wide, 32)
    return sum(r * c * sizes.get(n if n in sizes else n[n.find("scale") :], 8) for n, (r, c) in shapes.items())


def candidates(config: ARBConfig, rows: int, columns: int, target: float, kinds: Sequence[str]) -> list[Candidate]:
    """The forms that a linear `[rows, columns]` may get, by rising bits within a kind."""
    found: dict[tuple[str, int], Candidate] = {}
    if "arb-hrc" in kinds:
        for planes in range(1, MAX_PLANES + 1):
            settings = {"planes": planes} if config.method == "arb-hrc" else {"method": "arb-hrc", "planes": planes}
            bits = stored_bits(with_choices(config, settings), rows, columns)
            found["arb-hrc", bits] = Candidate(settings, bits, "arb-hrc", True)
    if "arb-dbf" in kinds:
        tried = [target * size for size in TRIED]
        grid = [target * SPREAD["arb-dbf"] ** (2 * step / STEPS - 1) for step in range(STEPS + 1)]
        for bits_per_weight in [*tried, *grid]:
            choices = with_choices(config, {"method": "arb-dbf", "factor_bits": bits_per_weight})
            rank = choices.resolved_rank(rows, columns)
            rank = max(8, rank - rank % 8)  # rows of the outer factor end at whole bytes
            settings = {"rank": rank} if config.method == "arb-dbf" else {"method": "arb-dbf", "rank": rank}
            bits = stored_bits(with_choices(config, settings), rows, columns)
            found.setdefault(("arb-dbf", bits), Candidate(settings, bits, "arb-dbf", bits_per_weight in tried))
    return list(found.values())


def allowed_forms(
    options: Sequence[Candidate], weights: int, target: float, spread: Mapping[str, float] = SPREAD
) -> list[Candidate]:
    """The candidates of a linear whose bits are near enough to the target; the smallest one where none is."""
    near = [form for form in options if target / spread[form.kind] <= form.bits / weights <= target * spread[form.kind]]
    return near or [min(options, key=lambda form: form.bits)]


@torch.no_grad()
def measured(
    model: PreTrainedModel,
    forms: Mapping[str, Sequence[Candidate]],
    configs: Mapping[str, ARBConfig],
    batches: Sequence[Any],
    device: torch.device | str,
    seed: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, set[str]]]]:
    """The divergence that each tried candidate of each linear causes by itself, in nats a token; and by name and kind
    the scales that float16 did not hold (a row or column of weights far below the others is enough)."""
    trials: dict[str, list[ARBLinear]] = {}
    wide: dict[str, dict[str, set[str]]] = {name: {} for name in forms}

    def attempt(name: str, module: nn.Module, hessian: torch.Tensor | None, tokens: int) -> tuple[Any, float | None]:
        made, error = [], None
        for form in forms[name]:
            if form.tried:
                choices = _quick(with_choices(configs[name], dict(form.settings)))
                packed, record = binarize_linear(name, module, choices, hessian, tokens, hadamard_must_pay=False)
                made.append(packed)  # a few bits a weight: it may stay on the device
                floats = {key for key, tensor in packed.packed().items() if tensor.dtype == torch.float32}
                wide[name].setdefault(form.kind, set()).update(floats)
                error = record.output_error
        trials[name] = made
        return module, error

    CalibrationWalk(model, list(forms), attempt, batches, device).run()
    some = [one for batch in batches for one in (batch.split(1) if isinstance(batch, torch.Tensor) else [batch])]
    return divergences(model, trials, some[:SEQUENCES], device, seed), wide


def _quick(config: ARBConfig) -> ARBConfig:
    config = copy.copy(config)
    config.num_iterations = max(2, math.ceil(config.resolved_num_iterations / EFFORT))
    if config.resolved_admm_iterations:
        config.admm_iterations = math.ceil(config.resolved_admm_iterations / EFFORT)
    config.scale_bits = None
    return config


def divided(
    forms: Mapping[str, Sequence[Candidate]],
    damages: Mapping[str, Sequence[float]],
    weights: Mapping[str, int],
    budget: int,
    temper: float = TEMPER,
    spread: Mapping[str, float] = SPREAD,
) -> dict[str, Choice]:
    """The candidate of each linear, within the budget.

    Args:
        forms: name -> candidates.
        damages: name -> the divergence that each tried one of them causes, in their order.
        weights: name -> number of weights.
        budget: bits of all of them together.
        temper: exponent of a linear's divergence for each of its weights, at the target. With 0, linears whose error
            falls alike get the same bits; with 1, what they add up to is made as small as can be.
        spread: by kind, how far the bits of a linear may be from the target, as a factor.

    Raises:
        ValueError: the smallest choices together exceed the budget.
    """
    target = budget / sum(weights.values())
    choices: dict[str, list[Choice]] = {}
    for name, options in forms.items():
        tried = [(form, damage) for form, damage in zip((f for f in options if f.tried), damages[name], strict=True)]
        choices[name] = []
        curves: list[tuple[Candidate, float]] = []
        for kind in dict.fromkeys(form.kind for form in options):
            own = [form for form in options if form.kind == kind]
            known = [(form.bits, damage) for form, damage in tried if form.kind == kind]
            curves += zip(own, interpolate(known, [form.bits for form in own]), strict=True)
        # the divergence that the linear causes at the target, by its weights, decides how much it counts
        usual = interpolate(
            sorted({form.bits: damage for form, damage in tried}.items()), [int(target * weights[name])]
        )[0]
        scale = max(usual / weights[name], 1e-20) ** (temper - 1)
        allowed = allowed_forms(options, weights[name], target, spread)
        choices[name] = [Choice(f.bits, damage * scale, dict(f.settings)) for f, damage in curves if f in allowed]
    return allocate(choices, budget)


def chosen(
    model: PreTrainedModel,
    configs: Mapping[str, ARBConfig],
    batches: Sequence[Any],
    device: torch.device | str,
    target: float,
    kinds: Sequence[str],
    seed: int,
) -> tuple[dict[str, list[Candidate]], dict[str, list[float]], dict[str, int]]:
    """Candidates, their divergences, and weights by name."""
    shapes = {name: linear_shape(model.get_submodule(name)) for name in configs}
    forms = {name: candidates(configs[name], *shapes[name], target, kinds) for name in configs}
    damages, wide = measured(model, forms, configs, batches, device, seed)
    for name, options in forms.items():
        if any(wide[name].values()):
            forms[name] = [_widened(form, configs[name], shapes[name], wide[name][form.kind]) for form in options]
    return forms, damages, {name: rows * columns for name, (rows, columns) in shapes.items()}


def _widened(form: Candidate, config: ARBConfig, shape: tuple[int, int], wide: Collection[str]) -> Candidate:
    """A candidate with the bits that it stores where float16 does not hold some of its scales."""
    choices = with_choices(config, dict(form.settings))
    if choices.resolved_scale_bits == 8:  # a grid of its own range holds nearly all
        return form
    return replace(form, bits=stored_bits(choices, *shape, wide))


def divide_budget(
    model: PreTrainedModel,
    selection: Selection,
    config: ARBConfig,
    batches: Sequence[torch.Tensor | Mapping[str, Any]],
    device: torch.device | str,
) -> dict[str, dict[str, Any]]:
    """What `overrides` must say of each linear so that all of them together keep to `target_bits_per_weight`.

    A linear whose override says how it is binarized (its method, planes, rank or bits) keeps that, out of the budget.

    Args:
        model: the float model in evaluation mode, on the CPU.
        selection: what is binarized of it.
        config: the choices.
        batches: the calibration inputs that something is fitted to.
        device: where the model runs and trials are fitted.

    Returns:
        name -> settings, of each linear that has a choice; nothing where all have been chosen.

    Raises:
        ValueError: the target is below what the smallest choices and the fixed linears take, or less than the fixed
            ones take by themselves; the model has experts to binarize; see also `divergences`.
    """
    target = config.target_bits_per_weight
    assert target is not None
    if experts := [name for name in selection.convert if name in selection.experts]:
        raise ValueError(
            f"{experts[0]}: target_bits_per_weight={target} divides bits among linears, not experts, yet. Give planes "
            "instead, and other ones to some modules as overrides."
        )
    shapes = {name: linear_shape(model.get_submodule(name)) for name in selection.convert}
    fixed = {name for name in selection.convert if _is_fixed(config, name)}
    weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
    budget = math.floor(target * sum(weights.values()))
    budget -= sum(stored_bits(selection.convert[name], *shapes[name]) for name in fixed)
    free = {name: choices for name, choices in selection.convert.items() if name not in fixed}
    if budget < 0:
        raise ValueError(
            f"target_bits_per_weight={target} is {-budget:,} bits less than what the overrides give to "
            f"{len(fixed)} modules: raise it, or give them less."
        )
    if not free:
        return {}
    kinds = [config.method] if config.method != AUTO else ["arb-hrc", "arb-dbf"]
    own = budget / sum(weights[name] for name in free)
    least = 0
    for name, choices in free.items():
        options = candidates(choices, *shapes[name], own, kinds)
        least += min(form.bits for form in allowed_forms(options, weights[name], own))
    if least > budget:  # told before the trials, which take as long as binarizing the model
        total = sum(weights.values())
        needed = math.ceil(1e4 * (target + (least - budget) / total)) / 1e4
        raise ValueError(
            f"target_bits_per_weight={target} is less than the {needed:.4f} that the smallest choices of all modules "
            "take together: raise it, or leave modules out with modules_to_not_convert."
        )
    forms, damages, sizes = chosen(model, free, batches, device, own, kinds, config.seed)
    found = divided(forms, damages, sizes, budget)
    tell(found, sizes)
    return {name: dict(choice.settings) for name, choice in found.items()}


def _is_fixed(config: ARBConfig, name: str) -> bool:
    given = (entry for pattern, entry in config.overrides.items() if matches(pattern, name))
    return any(key in entry for entry in given for key in ("method", "planes", "rank", "factor_bits"))


def tell(found: Mapping[str, Choice], weights: Mapping[str, int]) -> None:
    """Prints which kind of linear got how many bits, where progress is printed."""
    if not is_progress_bar_enabled():
        return
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    total = sum(choice.bits for choice in found.values()) / sum(weights.values())
    print(f"{total:.4f} bits a weight, divided by what they do to the model's predictions:", file=sys.stderr)
    for kind, names in kinds.items():
        bits = [found[name].bits / weights[name] for name in names]
        mean = sum(found[name].bits for name in names) / sum(weights[name] for name in names)
        print(
            f"  {kind}: {mean:.2f} bits a weight, from {min(bits):.2f} to {max(bits):.2f} ({len(names)} modules)",
            file=sys.stderr,
        )
