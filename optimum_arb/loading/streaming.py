"""Binarizing a model without calibration, weight by weight while its checkpoint streams in."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from ..calibration.workers import one_thread
from ..conversion import binarize_linear
from ..experts.conversion import binarize_matrix
from ..nn import ARBExperts

if TYPE_CHECKING:
    from ..quantizer import ARBHfQuantizer


class BinarizeOnLoad(ConversionOps):
    """Binarizes one weight as it comes from the file, and puts an `ARBLinear` in its module's place.

    transformers gathers the errors of all tensors and hides them in a table. So the first error is kept, in the
    quantizer's `failure`, the weights after it pass as they are, and the quantizer raises it once they are loaded.
    """

    def __init__(self, quantizer: ARBHfQuantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            name = self.quantizer.selection.by_parameter(key)
            if model is None or name is None or self.quantizer.failure is not None:
                result[key] = tensor
                continue
            try:
                experts = name in self.quantizer.selection.experts
                with one_thread(tensor.device):
                    result.update((self._binarize_experts if experts else self._binarize)(name, tensor, model))
            except (ValueError, RuntimeError) as error:
                self.quantizer.failure = error
                result[key] = tensor
        return result

    def _binarize_experts(self, name: str, tensor: torch.Tensor, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        empty = module._parameters[key]
        if empty is None or tensor.shape != empty.shape:
            raise ValueError(
                f"{name}: it is {list(tensor.shape)} in the checkpoint and "
                f"{'absent' if empty is None else list(empty.shape)} in the model. They do not belong together."
            )
        config = self.quantizer.selection.convert[name]
        packed = module if isinstance(module, ARBExperts) else ARBExperts(module, config.backend)
        matrix = self.quantizer.selection.experts[name]
        self.quantizer.records[name] = binarize_matrix(name, matrix, tensor, config, packed)
        model.set_submodule(owner, packed)
        return {f"{owner}.{own}": packed.get_parameter(own) for own in packed.packed_names(key)}

    def _binarize(self, name: str, tensor: torch.Tensor, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        module = model.get_submodule(name)
        empty = module._parameters["weight"]
        if empty is None or tensor.shape != empty.shape:
            raise ValueError(
                f"{name}: its weight is {list(tensor.shape)} in the checkpoint and "
                f"{'absent' if empty is None else list(empty.shape)} in the model. They do not belong together."
            )
        loaded = copy.copy(module)  # of the module that `model` holds, nothing may change before all went well
        loaded._parameters = {**module._parameters, "weight": nn.Parameter(tensor, requires_grad=False)}
        packed, self.quantizer.records[name] = binarize_linear(name, loaded, self.quantizer.selection.convert[name])
        model.set_submodule(name, packed)
        return {f"{name}.{key}": parameter for key, parameter in packed.named_parameters() if key != "bias"}
