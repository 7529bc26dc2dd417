"""A model that has loaded in float is binarized layer by layer, on calibration tokens if there are any."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..budget.trials import divide_budget
from ..calibration import CalibrationWalk
from ..calibration.data import calibration_batch_size, calibration_record, split_batches
from ..calibration.distributed import current_ranks, model_fingerprint
from ..calibration.experts import LayerStatistics, RoutedInputs
from ..calibration.ranks import Ranks
from ..calibration.refinement import Refiner
from ..config import ARBConfig
from ..config.choices import AUTO
from ..conversion import Record, binarize_linear
from ..custom_data import CalibrationInputs
from ..experts.conversion import binarize_experts, held_out_errors
from ..format.packing import stored_bytes
from ..modules import Selection
from ..nn import ARBLinear
from ..version import __version__
from .placement import calibration_device

logger = logging.getLogger(__name__)


class Stream(Protocol):
    """What binarizes a model from disk to disk (`optimum_arb.checkpoint`): where the walk finds and leaves weights.

    Attributes:
        device: where layers run.
    """

    device: torch.device

    def opened(
        self, model: PreTrainedModel, task: Task, calibration: dict[str, Any] | None
    ) -> AbstractContextManager[dict[str, Any]]:
        """The walk's options `weights`, `activations`, `device` and `progress`, for as long as it runs."""

    def digest(self, file: Path) -> str:
        """SHA-256 of the content of a file of the model, once the walk is over; several threads may ask at once."""


@dataclass
class Task:
    """What is binarized, by what, and what is known of it then.

    Attributes:
        config: the choices; a budget of bits that is divided goes into its overrides.
        selection: which modules are binarized, with the choices for each.
        records: name of a binarized module -> what is known of how it was made; filled by `binarize_model`.
        tokens: what it is calibrated on, or None.
        device_map: as the user gave it, which says where the layers are binarized.
        stream: what reads and writes the model layer by layer; None where it has been loaded.
        error_correction: what the walk did of what the configuration asks for; set by `binarize_model`.
        refinement: the figures of the refinement, if there was one; set by `binarize_model`.
    """

    config: ARBConfig
    selection: Selection
    records: dict[str, Record]
    tokens: torch.Tensor | CalibrationInputs | None = None
    device_map: Any = None
    stream: Stream | None = None
    error_correction: float = 0.0
    refinement: dict[str, Any] | None = None


def binarize_model(model: PreTrainedModel, task: Task) -> None:
    """Binarizes the loaded model, or the one that the stream loads, layer by layer.

    Raises:
        ValueError: a weight or an activation that is not finite, a choice that does not go with several processes, or
            processes that do not binarize the same.
    """
    config, selection, records = task.config, task.selection, task.records

    def binarize(name: str, module: nn.Module, hessian: torch.Tensor | None, tokens: int):
        packed, record = binarize_linear(name, module, selection.convert[name], hessian, tokens)
        records[name] = record
        return packed, record.output_error

    def binarize_layer(name: str, module: nn.Module, routed: RoutedInputs | None):
        packed, found = binarize_experts(name, module, routed, selection.of_experts(name), ranks)
        records.update({f"{name}.{key}": record for key, record in found.items()})
        return packed, [r.output_error for r in found.values() if r.output_error is not None]

    def measure(name: str, module: nn.Module, packed: nn.Module, statistics: LayerStatistics):
        for found, error, count in held_out_errors(name, module, packed, statistics):
            records[found] = replace(records[found], held_out_error=error, held_out_tokens=count)

    ranks = current_ranks()
    device = calibration_device(task.device_map, ranks) if task.stream is None else task.stream.device
    batches: list[Any] = []
    held_out = 0
    if task.tokens is not None:
        length = task.tokens.shape[1] if isinstance(task.tokens, torch.Tensor) else 1
        size = calibration_batch_size(config, len(task.tokens), length, device)
        batches, held_out = split_batches(task.tokens, config.held_out_samples, size)
    model.eval()
    names = selection.modules()
    if config.target_bits_per_weight is not None and task.stream is None:  # which refuses it
        _divide_budget(model, task, batches[: len(batches) - held_out], device, ranks)
    refiner = None if config.refine is None else Refiner(config, records)
    own: dict[str, Any] = {"binarize_experts": binarize_layer, "ranks": ranks, "records": records}
    own |= {"held_out": held_out, "measure": measure, "error_correction": config.resolved_error_correction}
    own |= {"must_correct": bool(config.error_correction), "choices": selection.convert}
    if ranks.size > 1:
        if refiner is not None:
            raise ValueError(
                f"refine={config.refine!r} runs in one process, and {ranks.size} were started: each of them sees "
                "a part of the calibration samples alone. Start one process, or set refine=None."
            )
        ranks.check_same(_facts(model, task))
    if refiner is not None:
        own |= {"after_layer": refiner, "follow_float": True}
        refiner.check(model, names, batches, len(batches) - held_out)
    if task.stream is None:
        walk = CalibrationWalk(model, names, binarize, batches, device, **own)
        walk.run()
        if refiner is not None:
            refiner.finish(walk)
    else:
        calibration = None if task.tokens is None else calibration_record(config, task.tokens)
        with task.stream.opened(model, task, calibration) as options:
            walk = CalibrationWalk(model, names, binarize, batches, **own, **options)
            walk.run()
    found = dict(records)
    records.clear()  # filled by several threads: in an order of its own again
    records.update({name: found[name] for name in selection.convert if name in found} | found)
    task.error_correction = walk.error_correction
    if refiner is not None:
        task.refinement = refiner.summary(walk)
    if config.target_bits_per_weight is not None:
        _tell_exceeded(model, config.target_bits_per_weight)


def _divide_budget(model: PreTrainedModel, task: Task, batches: list[Any], device: torch.device, ranks: Ranks) -> None:
    """Chooses the size of each linear, and records it as overrides."""
    config = task.config
    if ranks.size > 1:
        raise ValueError(
            f"target_bits_per_weight={config.target_bits_per_weight} is divided in one process, and {ranks.size} "
            "were started: take the overrides from the configuration of a model that one process has made."
        )
    config.overrides |= divide_budget(model, task.selection, config, batches, device)
    if config.method == AUTO:
        config.method = "arb-hrc"  # of no linear here: each has its own among the overrides
    for name in task.selection.convert:
        choices = config.for_module(name)
        assert choices is not None
        task.selection.convert[name] = choices


def _tell_exceeded(model: PreTrainedModel, target: float) -> None:
    """Warns where a model has more bits than its budget: some scales turned out to need float32."""
    linears = [module for module in model.modules() if isinstance(module, ARBLinear)]
    bits = 8 * sum(stored_bytes(linear.packed()) for linear in linears)
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    if bits > target * weights:
        logger.warning(
            "target_bits_per_weight=%s is exceeded: the model has %.4f bits a weight, because float16 does not hold "
            "some scales, which no trial told. With a target lower by the difference it keeps to it.",
            target,
            bits / weights,
        )


def _facts(model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """What all processes must have in common that binarize a model together."""
    record = {} if task.tokens is None else calibration_record(task.config, task.tokens)
    choices = {key: value for key, value in task.config.to_dict().items() if key != "dataset"}
    return {
        "version of optimum_arb": __version__,
        "version of torch": torch.__version__,
        **choices,
        "set of calibration tokens (their SHA-256)": record.get("fingerprint"),
        "model": model_fingerprint(model),
    }
