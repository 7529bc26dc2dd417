"""What a binarized model on disk holds, read from its configuration and its safetensors headers alone."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .config import ARBConfig
from .format.factors import LAYOUT_NAME
from .format.layout import form_name
from .format.packing import STORED_NAMES
from .layer_warnings import LayerWarning, layer_warnings
from .modules import linear_shape, select_modules
from .report import ModuleReport
from .stored.experts import describe_experts, packed_experts
from .stored.keys import KeyMap
from .stored.linears import describe, packed_linears
from .stored.report import find_report, matching_modules, read_report
from .stored.tensors import stored_tensors, tensor_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredModule:
    """A binarized linear, or a matrix of all experts of a layer, on disk.

    Attributes:
        name: the module's name (of experts: the parameter's in the model).
        method: the method that made it.
        layout: the name of its layout.
        shape: (out_features, in_features), of experts (experts, out_features, in_features).
        stored_bytes: bytes of the packed weight with all its companions (the bias, which stays in float, not counted).
        bits_per_weight: the same in bits over the number of weights.
    """

    name: str
    method: str
    layout: str
    shape: tuple[int, ...]
    stored_bytes: int
    bits_per_weight: float


@dataclass
class Inspection:
    """A binarized model on disk.

    Attributes:
        config: the configuration that it was binarized with.
        modules: the binarized linears, in the order of the model.
        kept: name of a linear that stayed in float -> the reason.
        float_tensors: name of a tensor that is not part of a binarized weight -> bytes of its data.
        stored_bytes: bytes of all tensors.
        file_bytes: bytes of the safetensors files, which is `stored_bytes` and the headers (of a model on the Hub:
            without the headers).
        report: the errors of the modules, from the report that lies beside the model; None without one.
        reproduce: what that report says of the run that binarized the model.
    """

    config: ARBConfig
    modules: list[StoredModule] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    float_tensors: dict[str, int] = field(default_factory=dict)
    stored_bytes: int = 0
    file_bytes: int = 0
    report: list[ModuleReport] | None = None
    reproduce: dict[str, Any] | None = None

    @property
    def warnings(self) -> list[LayerWarning]:
        """What looks broken, see `optimum_arb.layer_warnings`; nothing without a report."""
        return layer_warnings(self.report or [])

    @property
    def weights(self) -> int:
        """Number of binarized weights."""
        return sum(math.prod(module.shape) for module in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight over all binarized linears."""
        return 8 * sum(module.stored_bytes for module in self.modules) / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "weights": self.weights,
            "stored_bytes": self.stored_bytes,
            "file_bytes": self.file_bytes,
            "config": self.config.to_dict(),
            "modules": [asdict(module) for module in self.modules],
            "kept": self.kept,
            "float_tensors": self.float_tensors,
            "report": None if self.report is None else [asdict(module) for module in self.report],
            "warnings": [asdict(warning) for warning in self.warnings],
            "reproduce": self.reproduce,
        }


def inspect_model(name: str | Path) -> Inspection:
    """Reads what a binarized model holds.

    Args:
        name: directory, or name on the Hub (of which only the configuration and the headers are downloaded).

    Raises:
        FileNotFoundError: the directory holds no safetensors file, or not all of them.
        ValueError: the model is not binarized by optimum_arb, a file is damaged, or a tensor of a binarized module is
            missing, unknown, or of the wrong shape or dtype.
    """
    model_config = AutoConfig.from_pretrained(name)
    quantization: Any = getattr(model_config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "arb":
        raise ValueError(f"{name} is not binarized: its config.json has no quantization_config of method 'arb'.")
    config = ARBConfig.from_dict(quantization)
    tensors, file_bytes = stored_tensors(name)
    model = skeleton(model_config)
    selection = select_modules(model, config, strict=False, stored=True)
    names = KeyMap(model)
    experts = packed_experts(tensors, names, selection.experts)
    linears = {names.module(linear.key): linear for linear in packed_linears(tensors)}  # files may name them otherwise
    linears = {name: linear for name, linear in linears.items() if name not in experts}
    missing = sorted(set(selection.convert) - set(linears) - set(experts))
    if missing:
        parameter = selection.parameter(missing[0])
        raise ValueError(f"{missing[0]}: the tensor '{parameter}' of {name} is missing, or is not packed.")
    result = Inspection(config, kept=selection.keep, file_bytes=file_bytes)
    for key in [*linears, *experts]:
        choices = selection.convert.get(key)
        if choices is None:
            reason = selection.keep.get(key, "the model has no such linear")
            raise ValueError(f"{key}: its weight is packed in {name}, but should not be ({reason}).")
        if key in experts:
            matrix = selection.experts[key]
            describe_experts(experts[key], choices, matrix)
            form = choices.layout_name
            shape: tuple[int, ...] = (matrix.experts, matrix.out_features, matrix.in_features)
            parts = [tensors[part] for part in experts[key].keys()]  # noqa: SIM118 (it is no dict)
        else:
            shape = linear_shape(model.get_submodule(key))
            described = describe(linears[key], choices, *shape)
            layout = LAYOUT_NAME if "rank" in described else described["layout"].name
            form = form_name(layout, described.get("hadamard", 0))
            parts = list(linears[key].tensors.values())
        count = sum(tensor_bytes(tensor) for tensor in parts)
        bits = 8 * count / math.prod(shape)
        result.modules.append(StoredModule(key, choices.method, form, shape, count, bits))
    order = {key: index for index, key in enumerate(selection.convert)}
    result.modules.sort(key=lambda module: order[module.name])
    stems = [linear.key for linear in linears.values()]
    packed = {f"{key}.weight" + ("" if part == "weight" else f"_{part}") for key in stems for part in STORED_NAMES}
    packed |= {key for stored in experts.values() for key in stored.keys()}  # noqa: SIM118
    result.float_tensors = {key: tensor_bytes(tensor) for key, tensor in tensors.items() if key not in packed}
    result.stored_bytes = sum(tensor_bytes(tensor) for tensor in tensors.values())
    _add_report(name, result)
    return result


def _add_report(name: str | Path, result: Inspection) -> None:
    """What the report beside the model knows, if it is of this model."""
    path = find_report(name)
    report = None if path is None else read_report(path)
    if report is None:
        return
    result.report = matching_modules(report, {m.name: (m.layout, m.stored_bytes) for m in result.modules})
    if result.report is None:
        logger.warning("%s is of another model than the one that lies beside it, and is not read.", path)
        return
    result.reproduce = report["reproduce"]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The float model without its weights, for the names and shapes of its modules."""
    architecture = config.architectures[0] if config.architectures else ""
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"The architecture {architecture!r} is none of transformers' own: it cannot be inspected.")
    with torch.device("meta"):
        return model_class._from_config(config)
