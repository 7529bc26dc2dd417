"""Refinement as a configuration asks for it: what the walk does with each layer, and what is recorded of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..algorithms import output_error
from ..config import ARBConfig
from ..conversion import Record
from ..nn import ARBLinear
from .layers import find_layers
from .refine import float_weight, refine_layer
from .refine_model import logits, refine_model
from .tuning import Refinement, RefineSettings, split_batches
from .turn import LayerTurn
from .walk import CalibrationWalk

logger = logging.getLogger(__name__)

# The last pass sees the whole model: smaller steps.
MODEL_STEPS, MODEL_LEARNING_RATE = 200, 0.001


class Refiner:
    """Refines a model as its configuration says; the walk's `after_layer`.

    Args:
        config: of the model; `refine` is set.
        records: name of a binarized module -> what is known of it; what refinement changes in it is written there.

    Attributes:
        results: name of a layer -> what its tuning did, of the layers that were tuned in this run.
        model: what the last pass did, with `refine="model"`.
    """

    def __init__(self, config: ARBConfig, records: dict[str, Record]):
        self.config = config
        self.records = records
        self.settings = layer_settings(config)
        self.results: dict[str, Refinement] = {}
        self.model: Refinement | None = None

    def __call__(self, turn: LayerTurn) -> None:
        """Tunes a layer and measures the errors of its linears again.

        Raises:
            ValueError: as `optimum_arb.calibration.refine.refine_layer`.
        """
        result = refine_layer(turn, self.settings)
        self.results[turn.name] = result
        for name in self.records:
            if name.startswith(turn.name + "."):
                self.records[name] = replace(self.records[name], refined=[result.before, result.after])
        for name in turn.targets:
            packed = turn.layer.get_submodule(name.removeprefix(turn.name + "."))
            if isinstance(packed, ARBLinear) and name in self.records:
                self._measure(name, packed, turn)

    def _measure(self, name: str, packed: ARBLinear, turn: LayerTurn) -> None:
        weight, restored = float_weight(turn.modules[name]), packed.dequantize(torch.float32)
        linears = turn.statistics.linears
        hessian, (held_out, _) = linears.hessian(name), linears.held_out(name)
        self.records[name] = replace(
            self.records[name],
            weight_error=output_error(weight, restored, None),
            output_error=None if hessian is None else output_error(weight, restored, hessian),
            held_out_error=None if held_out is None else output_error(weight, restored, held_out),
        )

    def check(self, model: PreTrainedModel, targets: Sequence[str], batches: Sequence[Any], fitted: int) -> None:
        """What would stand against refinement, before the work begins.

        Args:
            model: the float model.
            targets: what is to be binarized.
            batches: the calibration batches, of which the first `fitted` may be trained on.

        Raises:
            ValueError: fewer than two calibration batches; with the last pass, also a model without logits, or linears
                to binarize that are in no layer.
        """
        split_batches(fitted, self.settings.held_out)
        if self.config.refine != "model" or any(p.is_meta for p in model.parameters()):
            return  # from disk to disk there is no last pass
        layers = [layer for group in find_layers(model, targets) for layer in group.names]
        outside = [name for name in targets if not any(name.startswith(layer + ".") for layer in layers)]
        if outside:
            raise ValueError(
                f"refine='model' needs the float model's {outside[0]}, which is in none of its layers and would be "
                f"binarized: use refine='block', or modules_to_not_convert={outside!r}."
            )
        first = batches[0]
        logits(model, first[:1, :8] if isinstance(first, torch.Tensor) else first, torch.device("cpu"))

    def finish(self, walk: CalibrationWalk) -> None:
        """The last pass, if it is asked for, once the walk is over.

        Raises:
            ValueError: as `optimum_arb.calibration.refine_model.refine_model`.
        """
        if self.config.refine != "model":
            return
        assert walk.chain is not None  # a walk that follows the float model has one
        settings = replace(self.settings, steps=MODEL_STEPS, learning_rate=MODEL_LEARNING_RATE, sign_learning_rate=0.0)
        batches, outputs = walk.batches[: walk.fitted], walk.float_outputs[: walk.fitted]
        self.model = refine_model(walk.model, walk.chain, batches, outputs, settings, walk.device)

    def summary(self, walk: CalibrationWalk) -> dict[str, Any]:
        """What a saved configuration says of it: mean losses of the layers, and the divergence of the last pass, each
        before and after."""
        assert walk.chain is not None
        layers = []
        for layer in walk.chain.names:  # the records, unlike `results`, know of what an interrupted run has done
            found = (r.refined for name, r in self.records.items() if name.startswith(layer + ".") and r.refined)
            layers += list(itertools.islice(found, 1))
        before, after = (sum(losses) / len(layers) for losses in zip(*layers, strict=True))
        summary: dict[str, Any] = {"layer_loss": [before, after]}
        if self.model is not None:
            summary["divergence"] = [self.model.before, self.model.after]
        seconds = sum(result.seconds for result in self.results.values())
        logger.info(
            "Refinement: loss of a layer %.4f -> %.4f (mean of %d, held out), %.0f s.",
            before,
            after,
            len(layers),
            seconds,
        )
        if self.model is not None:
            logger.info(
                "Refinement: divergence of the model %.4f -> %.4f (held out), %.0f s.",
                self.model.before,
                self.model.after,
                self.model.seconds,
            )
        return summary


def layer_settings(config: ARBConfig) -> RefineSettings:
    """The settings of a layer's tuning that a configuration asks for."""
    settings = RefineSettings(seed=config.seed)
    if config.refine_steps is not None:
        settings = replace(settings, steps=config.refine_steps)
    if config.refine_learning_rate is not None:
        settings = replace(settings, learning_rate=config.refine_learning_rate)
    if config.refine_signs is False:
        settings = replace(settings, sign_learning_rate=0.0)
    return settings
