"""The modules of a layer, each binarized where the ranks have it, and put in the place of the float one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from ..algorithms import outputs_key
from ..algorithms.hessian import PreparedHessian
from ..algorithms.preparation import prepared_part
from ..algorithms.shared_work import Part, SharedWork, sharing
from ..config import ARBConfig
from ..experts.matrices import is_experts
from ..modules import linear_shape, linear_weight
from ..nn import ARBExperts, ARBLinear
from .ahead import Ahead
from .division import Division
from .experts import LayerStatistics, RoutedInputs
from .gathering import sum_statistics
from .memory import give_back_memory
from .progress import Progress
from .ranks import Ranks
from .sending import share_modules
from .workers import in_order, one_thread

# Matrices that are fitted at once on the CPU: the three large ones of a decoder layer and its attention's take equally
# long, so that more would not end sooner, and each holds some copies of its weight and calibration matrix.
FITS = 4
# Weights of all fits at once on a GPU, which takes 40 bytes for each: query, key and value projection of a 7B.
FITTED_WEIGHTS = 1 << 26
# Columns up to which a CPU prepares a calibration matrix, for all fits under it, beside solving for the correction of
# their weights: each takes three float64 matrices of so many columns.
PREPARED_BEFORE = 2048

# (name, float module, calibration matrix or None, tokens) -> the binarized module and its output error
Binarize = Callable[[str, nn.Module, "torch.Tensor | None", int], "tuple[ARBLinear, float | None]"]
# (name, float experts, their inputs or None) -> the binarized module and the output errors of its matrices
BinarizeExperts = Callable[[str, nn.Module, "RoutedInputs | None"], "tuple[ARBExperts, list[float]]"]
# (name, float module, binarized module, what the layer received); is called after each of the two above
Measure = Callable[[str, nn.Module, nn.Module, LayerStatistics], None]


class Fitting:
    """What `CalibrationWalk` does once it knows what the modules of a layer receive; arguments as there.

    Attributes:
        errors: output errors of what was binarized here, in this order.
        error_correction: strength; may be changed.
    """

    def __init__(
        self,
        model: nn.Module,
        binarize: Binarize,
        binarize_experts: BinarizeExperts | None,
        device: torch.device,
        progress: Progress,
        ranks: Ranks,
        records: dict[str, Any],
        measure: Measure | None,
        choices: Mapping[str, ARBConfig],
    ):
        self.model = model
        self.errors: list[float] = []
        self.error_correction = 0.0
        self._linear = binarize
        self._experts = binarize_experts
        self._device = device
        self._progress = progress
        self._ranks = ranks
        self._records = records
        self._measure = measure
        self._choices = choices

    def binarize(
        self,
        names: list[str],
        statistics: LayerStatistics | None,
        keep: bool = False,
        ahead: Ahead | None = None,
    ) -> dict[str, nn.Module]:
        """Binarizes modules of a layer, of those that run at once or in one step.

        Args:
            names: of the modules.
            statistics: what they receive; None to binarize them from their weights alone.
            keep: whether the float modules are asked for.
            ahead: what is run before a rank fits its part of them, if it has any.

        Returns:
            If they are to be kept, name -> the float module that was binarized on this rank.
        """
        owners = self._ranks.owners({name: self.model.get_submodule(name) for name in names})
        shapes = {name: linear_shape(self.model.get_submodule(name)) for name in owners}
        division = Division(self._ranks, self._device, self._choices, owners, shapes)
        if statistics is not None:
            sum_statistics(self._ranks, statistics, owners, division.needing, division.correcting)
        self._give_back()
        done: dict[str, nn.Module] = {}
        sources: dict[str, nn.Module] = {}
        own = [name for name in names if owners.get(name, self._ranks.rank) == self._ranks.rank]
        linears = [name for name in own if not is_experts(self.model.get_submodule(name))]

        def fit(name: str) -> tuple[nn.Module, list[float], float]:
            start = time.perf_counter()
            module = sources[name] = self._to_fit(name, statistics)
            hessian = None if statistics is None else statistics.linears.hessian(name)
            tokens = 0 if statistics is None else statistics.linears.tokens(name)
            work = shared.get(id(hessian))
            if work is not None and hessian is not None and name in division.energies:
                found = division.energies[name], linear_weight(module)  # whose address is no other's while it is here
                work.put(Part(hessian, outputs_key(found[1]), lambda: found), found)
            with sharing(work):
                packed, error = self._linear(name, module, hessian, tokens)
            return packed, [] if error is None else [error], time.perf_counter() - start

        shared: dict[int, SharedWork] = {}
        if statistics is not None:  # made of the wider sums once, not by several threads
            found = [statistics.linears.hessian(name) for name in linears]
            if self._device.type == "cuda":  # what is shared stays in memory for all fits
                several = [one for one in found if one is not None and sum(one is other for other in found) > 1]
                shared = {id(hessian): SharedWork(hessian) for hessian in several}
            shared |= division.work(statistics, self.error_correction)
            correct = partial(self._correct, linears, statistics)
            if self._device.type == "cpu":
                shared |= self._prepare(linears, statistics, correct, shared.keys())
            else:
                correct()
        if ahead is not None:
            ahead.run()
        largest = max((math.prod(shapes[name]) for name in linears), default=1)
        streams = min(FITS, len(linears), max(1, FITTED_WEIGHTS // largest))
        self._give_back()
        fits = in_order(fit, linears, self._device, FITS, streams)
        for name in own:
            packed: nn.Module
            errors: list[float]
            module = self.model.get_submodule(name)
            if is_experts(module):
                start = time.perf_counter()
                assert self._experts is not None
                routed = None if statistics is None else statistics.experts.pop(name)
                with one_thread(self._device):
                    packed, errors = self._experts(name, module, routed)
                seconds = time.perf_counter() - start
            else:
                packed, errors, seconds = next(fits)
                module = sources[name] if keep else sources.pop(name)
            self.errors += errors
            if self._measure is not None and statistics is not None:
                with one_thread(self._device):  # two sum in another order, seen on a CPU without AVX-512
                    self._measure(name, module, packed, statistics)
                statistics.held_out_experts.pop(name, None)
            if name in owners:  # of experts, every rank has them all by now
                done[name] = packed
            self.model.set_submodule(name, packed)
            self._progress.linear(name, seconds, errors)
        fits.close()
        if ahead is not None:
            ahead.fitted()
        shared.clear()
        division.finish()
        for name, module in share_modules(self._ranks, done, self._device, self._records).items():
            self.model.set_submodule(name, module)
        return sources

    def _give_back(self) -> None:
        """What the runs of the layer, the sums and the fits before these took would otherwise lie beside these: two
        layers of SmolLM2-135M on two threads took at most 745 MB with it and 885 without, for 1.7 % of the processor's
        time."""
        if self._device.type == "cpu":
            give_back_memory()

    def _prepare(
        self,
        linears: list[str],
        statistics: LayerStatistics,
        correct: Callable[[], None],
        known: Collection[int],
    ) -> dict[int, SharedWork]:
        """`correct`, and beside it what all fits begin with, on a CPU.

        Returns:
            that, by the id of a matrix; of those that are not `known`.
        """
        found: dict[int, SharedWork] = {}
        parts: dict[Hashable, tuple[Part[PreparedHessian], list[str]]] = {}
        for name in linears:
            hessian, choices = statistics.linears.hessian(name), self._choices.get(name)
            if hessian is None or id(hessian) in known or len(hessian) > PREPARED_BEFORE:
                continue
            if choices is not None and not choices.factorized and not choices.hadamard:
                found.setdefault(id(hessian), SharedWork(hessian))
                part = prepared_part(hessian, choices)
                parts.setdefault((id(hessian), part.key), (part, []))[1].append(name)

        def prepare(part: Part[PreparedHessian], names: list[str]) -> None:
            with suppress(ValueError):  # a fit will fail as well, and say of which linear
                found[id(part.matrix)].put(part, part.make(), len(names))

        tasks: list[Callable[[], None]] = [correct, *(partial(prepare, *each) for each in parts.values())]
        list(in_order(lambda task: task(), tasks, self._device, FITS))
        return found

    def _correct(self, linears: list[str], statistics: LayerStatistics) -> None:
        reached = [name for name in linears if statistics.linears.hessian(name) is not None]
        if statistics.corrections is not None and reached:  # with error correction, all share one input
            hessian = statistics.linears.hessian(reached[0])
            assert hessian is not None
            with one_thread(self._device):
                statistics.corrections.solve(reached, hessian, self.error_correction)

    def _to_fit(self, name: str, statistics: LayerStatistics | None) -> nn.Module:
        """The float module of this name, with error correction that of the weight to fit."""
        if statistics is None or statistics.corrections is None:
            return self.model.get_submodule(name)
        return statistics.corrections.corrected(name)
