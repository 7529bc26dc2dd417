"""The float experts of one layer into their binarized form, and what is known of how that went."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..algorithms import binarize, squared_errors
from ..calibration.experts import ROWS, LayerStatistics, RoutedInputs
from ..calibration.ranks import Ranks
from ..config import ARBConfig
from ..conversion import Record, linear_output_error
from ..format.packing import BinarizedWeight, block_count, pack, unpack
from ..nn import ARBExperts, ARBLinear
from .matrices import ExpertMatrix, expert_matrices, expert_weight
from .packing import packed_form, stack_experts

# Experts to which fewer calibration tokens were routed are binarized from their weights alone. In all of 8
# measurements (docs/experts.md) 8 tokens are better than none: output errors of .382 to .334, .363 to .206, ...
STARVED_TOKENS = 8
# Experts on which "search" looks for the number of salient columns of all.
SEARCHED_EXPERTS = 4


@dataclass
class _Errors:
    """Sums of squares over experts: of what the weights and the outputs lost, and of what they are."""

    weight_lost: float = 0.0
    weight_total: float = 0.0
    output_lost: float = 0.0
    output_total: float = 0.0
    starved: int = 0
    tokens: int = 0

    def add(self, weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor | None) -> None:
        lost, total = squared_errors(weight, restored, None)
        self.weight_lost, self.weight_total = self.weight_lost + lost, self.weight_total + total
        if hessian is not None:
            lost, total = squared_errors(weight, restored, hessian)
            self.output_lost, self.output_total = self.output_lost + lost, self.output_total + total

    def join(self, other: _Errors) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def record(self, config: ARBConfig, experts: int, calibrated: bool) -> Record:
        def ratio(lost: float, total: float) -> float:
            return lost / total if total > 0 else 0.0

        return Record(
            config.method,
            ratio(self.weight_lost, self.weight_total),
            ratio(self.output_lost, self.output_total) if calibrated else None,
            self.tokens,
            experts,
            self.starved,
        )


@dataclass
class _Fit:
    """A matrix of all experts on its way: `experts[e]` are the packed parts of expert e."""

    name: str
    matrix: ExpertMatrix
    config: ARBConfig
    experts: dict[int, list[dict[str, torch.Tensor]]] = field(default_factory=dict)
    errors: dict[int, _Errors] = field(default_factory=dict)

    def add(
        self, expert: int, weight: torch.Tensor, hessian: torch.Tensor | None, tokens: int, calibrated: bool
    ) -> None:
        """Binarizes the weight `[N, K]` of an expert."""
        where = f"{self.name}, expert {expert}"
        if not torch.isfinite(weight).all():
            raise ValueError(f"{where}: the weight holds NaN or Inf. Check the checkpoint, or skip this module.")
        if hessian is not None and not torch.isfinite(hessian).all():
            raise ValueError(
                f"{where}: the activations that reach it in calibration hold NaN or Inf. Load the model in another "
                "dtype (float32 or bfloat16 instead of float16), or check the checkpoint."
            )
        starved = calibrated and tokens < STARVED_TOKENS
        errors = self.errors[expert] = _Errors(starved=int(starved), tokens=tokens)
        parts = []
        for part in weight.float().split(self.matrix.part_features):
            try:
                found = binarize(part, None if starved else hessian, self.config)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            assert isinstance(found, BinarizedWeight)  # `select_modules` refuses factors of experts
            tensors = pack(found)
            stored = unpack(tensors, self.config.layout, part.shape[1], self.config.block_size)
            errors.add(part, stored.dequantize(), hessian)
            parts.append(tensors)
        self.experts[expert] = parts

    def finish(self, packed: ARBExperts, calibrated: bool) -> Record:
        """Puts the matrix into its module."""
        matrix = self.matrix
        try:
            tensors = stack_experts([self.experts[expert] for expert in range(matrix.experts)])
        except ValueError as error:
            raise ValueError(f"{self.name}: method {self.config.method!r}: {error}.") from error
        form = packed_form(matrix, self.config)
        packed.set_packed(matrix.name, form, tensors)
        errors = _Errors()
        for expert in range(matrix.experts):  # in their order, in which one process sums them too
            errors.join(self.errors[expert])
        return errors.record(self.config, matrix.experts, calibrated)

    def exchange(self, ranks: Ranks, device: torch.device) -> None:
        """Gets the experts that other ranks binarized."""
        own = {e: [{k: t.cpu() for k, t in part.items()} for part in parts] for e, parts in self.experts.items()}
        merged = ranks.merge(own, f"exchanging the experts of {self.name}")
        self.experts = {e: [{k: t.to(device) for k, t in part.items()} for part in p] for e, p in merged.items()}
        self.errors = ranks.merge(self.errors, f"exchanging the experts of {self.name}")


@torch.no_grad()
def binarize_matrix(
    name: str, matrix: ExpertMatrix, weights: torch.Tensor, config: ARBConfig, packed: ARBExperts
) -> Record:
    """Binarizes one matrix of all experts from its weights alone, on their device.

    Args:
        name: of the parameter in the model, for errors.
        matrix: which one it is.
        weights: the parameter, `[E, N, K]`, or `[E, K, N]` if transposed.
        config: the choices for it.
        packed: the module that takes the result.

    Raises:
        ValueError: NaN or Inf in a weight; the message names the expert.
    """

    def one(expert: int) -> torch.Tensor:
        return expert_weight(weights, matrix, expert)

    some = range(0, matrix.experts, max(1, matrix.experts // SEARCHED_EXPERTS))
    fit = _Fit(name, matrix, fixed_salient(config, matrix, ((one(e), None) for e in some)))
    for expert in range(matrix.experts):
        fit.add(expert, one(expert), None, 0, False)
    return fit.finish(packed, False)


@torch.no_grad()
def binarize_experts(
    name: str,
    module: nn.Module,
    routed: RoutedInputs | None,
    configs: Mapping[str, ARBConfig],
    ranks: Ranks | None = None,
) -> tuple[ARBExperts, dict[str, Record]]:
    """Binarizes the experts of a layer, each under the inputs that were routed to it, on the device of their weights.

    The inputs of `down_proj` are those that the float weights make of an expert's inputs. An expert with fewer than
    `STARVED_TOKENS` inputs is binarized from its weights alone; `Record.starved` counts those.

    Args:
        name: of the module.
        module: the float module; it is not changed.
        routed: its inputs in calibration; None to binarize all experts from their weights alone.
        configs: name of a matrix that is to be binarized -> the choices for it; the others stay in float.
        ranks: the processes that divide the experts; all of them must have the same inputs.

    Returns:
        The binarized module, and name of a matrix -> its record.

    Raises:
        ValueError: NaN or Inf in a weight or in the activations that reach an expert.
    """
    matrices = expert_matrices(module)
    packed = ARBExperts(module, next(iter(configs.values())).backend)
    if routed is None:
        return packed, {
            key: binarize_matrix(f"{name}.{key}", matrices[key], _parameter(module, key), config, packed)
            for key, config in configs.items()
        }
    counts = routed.tokens()
    most = sorted(range(len(counts)), key=lambda expert: -counts[expert])[:SEARCHED_EXPERTS]
    fits = []
    for index, (key, matrix) in enumerate(matrices.items()):
        if key in configs:
            weights = _parameter(module, key)

            def samples(index=index, matrix=matrix, weights=weights) -> Iterator:
                for expert in most:
                    hessian = _hessians(module, routed.rows(expert), expert, [index])[0]
                    yield expert_weight(weights, matrix, expert), hessian if counts[expert] >= STARVED_TOKENS else None

            fits.append((index, _Fit(f"{name}.{key}", matrix, fixed_salient(configs[key], matrix, samples()))))
    ranks = ranks or Ranks()
    for expert in ranks.mine(len(counts)):
        hessians = _hessians(module, routed.rows(expert), expert, [index for index, _ in fits])
        for (_, fit), hessian in zip(fits, hessians, strict=True):
            weights = _parameter(module, fit.matrix.name)
            fit.add(expert, expert_weight(weights, fit.matrix, expert), hessian, counts[expert], True)
    if ranks.size > 1:
        for _, fit in fits:
            fit.exchange(ranks, _parameter(module, fit.matrix.name).device)
    return packed, {fit.matrix.name: fit.finish(packed, True) for _, fit in fits}


@torch.no_grad()
def expert_output_errors(module: nn.Module, packed: ARBExperts, routed: RoutedInputs) -> dict[str, tuple[float, int]]:
    """The errors of binarized experts on inputs that nothing was fitted to.

    Args:
        module: the float experts.
        packed: their binarized form.
        routed: the inputs.

    Returns:
        Name of a binarized matrix -> its relative squared output error over all experts, and the inputs counted.
    """
    found = {}
    for index, (key, matrix) in enumerate(expert_matrices(module).items()):
        if key not in packed.forms:
            continue
        lost, total, tokens = 0.0, 0.0, 0
        for expert, count in enumerate(routed.tokens()):
            hessian = _hessians(module, routed.rows(expert), expert, [index])[0] if count else None
            if hessian is None:
                continue
            weight = expert_weight(_parameter(module, key), matrix, expert).float()
            parts = [packed.binarized(key, expert, part).dequantize() for part in range(matrix.parts)]
            part_lost, part_total = squared_errors(weight, torch.cat(parts).to(weight.device), hessian)
            lost, total, tokens = lost + part_lost, total + part_total, tokens + count
        if tokens:
            found[key] = (lost / total if total > 0 else 0.0, tokens)
    return found


def held_out_errors(
    name: str, module: nn.Module, packed: nn.Module, statistics: LayerStatistics
) -> Iterator[tuple[str, float, int]]:
    """The errors of a module, linear or experts, on what was held out: (name, relative squared output error, inputs).

    Nothing where no input was held out, or none reached the module.
    """
    if isinstance(packed, ARBExperts):
        for key, (error, tokens) in expert_output_errors(module, packed, statistics.held_out_experts[name]).items():
            yield f"{name}.{key}", error, tokens
    elif isinstance(packed, ARBLinear):
        hessian, tokens = statistics.linears.held_out(name)
        if hessian is not None:
            yield name, linear_output_error(module, packed, hessian), tokens


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.detach()


def _hessians(module: nn.Module, rows: torch.Tensor, expert: int, which: list[int]) -> list[torch.Tensor | None]:
    """X^T X of the inputs of some matrices of an expert, float32 `[K, K]`; None without inputs.

    Args:
        module: the float experts.
        rows: the inputs `[n, H]` of the expert.
        expert: its number.
        which: 0 for the matrix that the inputs enter, 1 for `down_proj`.
    """
    first, last = expert_matrices(module).values()
    weights = _parameter(module, first.name)
    if not len(rows):
        return [None] * len(which)
    found = [torch.zeros(m.in_features, m.in_features, device=weights.device) for m in (first, last)]
    bias = module._parameters.get(f"{first.name}_bias")
    for chunk in rows.split(ROWS):
        x = chunk.to(weights.device)
        if 0 in which:
            wide = x.to(torch.float32)
            found[0].addmm_(wide.T, wide)
        if 1 in which:
            out = nn.functional.linear(x, expert_weight(weights, first, expert))
            out = out if bias is None else out + bias[expert]
            out = type(module)._apply_gate(module, out) if module.has_gate else module.act_fn(out)  # type: ignore
            wide = out.to(torch.float32)
            found[1].addmm_(wide.T, wide)
    return [found[index] for index in which]


def fixed_salient(config: ARBConfig, matrix: ExpertMatrix, samples: Iterator) -> ARBConfig:
    """The configuration with one number of salient columns for all experts, which share a tensor.

    "search" is carried out on a few experts, and the mean number that it takes of a block is rounded.

    Args:
        config: the choices for the matrix.
        matrix: which one it is.
        samples: weight `[N, K]` and calibration matrix (or None) of the experts to search on; they are not asked for
            where nothing is searched.
    """
    if config.resolved_salient_columns != "search":
        return config
    quick = copy.copy(config)
    quick.num_iterations = 1  # columns are chosen before the refinement
    counts = []
    for weight, hessian in samples:
        for part in weight.float().split(matrix.part_features):
            if torch.isfinite(part).all():
                found = binarize(part, hessian, quick)
                assert isinstance(found, BinarizedWeight)  # a method that searches for salient columns
                counts.append(0 if found.salient_columns is None else len(found.salient_columns))
    blocks = block_count(matrix.in_features, config.block_size)
    fixed = copy.copy(config)
    fixed.salient_columns = max(1, round(sum(counts) / max(1, len(counts)) / blocks))
    return fixed
