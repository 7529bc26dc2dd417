"""A checkpoint that is binarized already: checked, its modules made empty, and checked again once they are loaded."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import ARBConfig
from ..conversion import Record, empty_linear
from ..modules import Selection, linear_shape
from ..nn import ARBExperts, ARBLinear
from ..stored.checks import (
    check_files,
    check_indices,
    check_other_tensors,
    check_permuted,
    check_same_kind,
    check_scales,
    check_shapes,
)
from ..stored.checksums import skipped, verify
from ..stored.experts import describe_experts, packed_experts
from ..stored.keys import KeyMap
from ..stored.linears import describe, packed_linears
from ..stored.report import read_report, restore_records
from ..stored.tensors import read_headers
from ..tensor_parallel.layers import is_divided
from .dtypes import cast_loaded, expected_dtypes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredModel:
    """What is known of a binarized model before its tensors are read.

    Attributes:
        records: name of a binarized module -> what is known of how it was made.
        reproduce: what it takes to repeat the run that binarized it, where the report beside it tells.
        dtypes: name of a tensor -> the dtype that it is to have in the model.
        shapes: name of a parameter -> its shape as it lies in the file.
    """

    records: dict[str, Record]
    reproduce: dict[str, Any] | None
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, torch.Size]


def expect_stored(
    model: PreTrainedModel, checkpoint_files: list[str] | None, config: ARBConfig, selection: Selection
) -> StoredModel:
    """Puts empty packed modules where the checkpoint holds packed tensors.

    Args:
        model: on the meta device, with float modules.
        checkpoint_files: its safetensors files.
        config: of the checkpoint.
        selection: the modules that the configuration lets be binarized.

    Raises:
        ValueError: the files are damaged, or are not what the configuration and the model say.
    """
    if not checkpoint_files or not all(str(f).endswith(".safetensors") for f in checkpoint_files):
        raise ValueError("A binarized model is loaded from safetensors files; this checkpoint has none.")
    check_files(checkpoint_files, model.config.name_or_path or "")
    headers = read_headers(checkpoint_files)
    names = KeyMap(model)
    experts = packed_experts(headers, names, selection.experts)
    stored = {names.module(linear.key): linear for linear in packed_linears(headers)}
    stored = {name: linear for name, linear in stored.items() if name not in experts}
    if not stored and not experts:
        raise ValueError(
            f"The quantization_config says that the model is binarized, but no tensor of {checkpoint_files[0]} is "
            "packed: these are the weights of a float model, under the configuration of a binarized one. To load them "
            "as they are, take the quantization_config out of config.json, or out of the config that you pass."
        )
    every = {*stored, *experts}
    names.check_complete(headers, every, selection)
    check_other_tensors(model, names, headers, every)
    records: dict[str, Record] = {}
    columns: dict[str, int] = {}
    for name, linear in stored.items():
        module = names.find(name)
        if module is None:
            continue  # a part of the saved model that this class does not have
        _check_selected(name, module, selection)
        own = config.for_module(linear.key) or selection.convert[name]
        check_permuted(linear, name, own, config.calibration)
        packed = empty_linear(module, **describe(linear, own, *linear_shape(module)))
        packed.train(module.training)
        model.set_submodule(name, packed)
        records[name] = Record(own.method)
        columns[f"{linear.key}.weight_salient_columns"] = packed.in_features
    for name, found in experts.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        _check_selected(name, module, selection)
        own = config.for_module(found.key, found.module) or selection.convert[name]
        description = describe_experts(found, own, selection.experts[name])
        layer = module if isinstance(module, ARBExperts) else ARBExperts(module, own.backend)
        layer.set_empty(key, **description)
        model.set_submodule(owner, layer)
        records[name] = Record(own.method, experts=found.matrix.experts)
        columns |= dict.fromkeys(found.tensors.get("salient_columns", ()), found.matrix.in_features)
    if not records:
        check_same_kind(model, names, headers)
    check_indices(checkpoint_files, columns)
    _verify(checkpoint_files, config)
    check_scales(checkpoint_files)
    beside = read_report(os.path.dirname(os.path.abspath(checkpoint_files[0])))
    if beside is not None:
        records = restore_records(records, beside)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    return StoredModel(records, None if beside is None else beside["reproduce"], expected_dtypes(model), shapes)


def check_loaded(model: PreTrainedModel, expected: StoredModel) -> None:
    """Once its tensors are loaded: their shapes, dtypes, and which of them may be trained.

    Raises:
        ValueError: a tensor has another shape than its module.
    """
    if not any(is_divided(module) for module in model.modules()):  # a device has a part of a shape
        check_shapes(model, expected.shapes)
    cast_loaded(model, expected.dtypes)
    for module in model.modules():
        if isinstance(module, (ARBLinear, ARBExperts)):
            packed = module.packed_names() if isinstance(module, ARBExperts) else None
            for key, parameter in module.named_parameters(recurse=False):
                # transformers lets every float tensor that it loads require a gradient
                parameter.requires_grad_(key == "bias" if packed is None else key not in packed)


def _verify(checkpoint_files: list[str], config: ARBConfig) -> None:
    if skipped(config.verify_checksums):
        return
    if verify(checkpoint_files, config.to_dict()) is None:
        logger.info(
            "%s records no checksums: an older optimum-arb saved it, or another tool wrote it anew. Its tensors "
            "were not verified; saving the model again records them.",
            checkpoint_files[0],
        )


def _check_selected(name: str, module: nn.Module, selection: Selection) -> None:
    if name not in selection.convert:
        reason = selection.keep.get(name, f"it is a {type(module).__name__}")
        raise ValueError(f"{name}: packed in the checkpoint, but the model keeps it in float ({reason}).")
