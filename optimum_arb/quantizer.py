"""`ARBHfQuantizer`: the only file that knows the protocol by which transformers loads and saves a model.

Without calibration, each weight is binarized while the checkpoint streams in. With it, the model loads in float on the
CPU, is binarized layer by layer and is placed then. An already binarized checkpoint is recognised by its tensors, whose
shapes are checked before anything is allocated.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .budget import divide_budget
from .calibration import CalibrationWalk, model_tokens
from .calibration.data import calibration_record, split_batches
from .calibration.distributed import Ranks, current_ranks, model_fingerprint
from .calibration.experts import LayerStatistics, RoutedInputs
from .calibration.refinement import Refiner, refinement_batch_size
from .checksums import placeholder, skipped, verify
from .config import ARBConfig
from .config.choices import AUTO
from .conversion import Record, binarize_linear, empty_linear, float_linear
from .custom_data import CalibrationInputs
from .experts.conversion import binarize_experts, held_out_errors, packed_form
from .experts.keys import conversions_for_loading, conversions_for_saving
from .experts.stored import describe_experts, packed_experts
from .hub.base_model import base_model_facts
from .keys import KeyMap
from .load_dtypes import cast_loaded, expected_dtypes
from .modules import Selection, linear_shape, resolved_skips, select_modules
from .nn import ARBExperts, ARBLinear, share_inputs
from .placement import calibration_device, check_no_disk, place_model
from .report import model_report
from .reproduce import model_facts, reproduce_block
from .stored import COMPANIONS, describe, packed_linears, read_headers
from .stored_checks import (
    check_config,
    check_files,
    check_indices,
    check_other_tensors,
    check_permuted,
    check_same_kind,
    check_scales,
    check_shapes,
)
from .stored_report import read_report, restore_records
from .streaming import BinarizeOnLoad
from .tensor_parallel import is_divided, localize, prepare, whole_state_dict
from .version import __version__

logger = logging.getLogger(__name__)

NOT_STORED = "not in the checkpoint"


class Stream(Protocol):
    """What binarizes a model from disk to disk (`optimum_arb.checkpoint`): where the walk finds and leaves weights."""

    def opened(
        self, model: PreTrainedModel, quantizer: ARBHfQuantizer, calibration: dict[str, Any] | None
    ) -> AbstractContextManager[dict[str, Any]]:
        """The walk's options `weights`, `activations`, `device` and `progress`, for as long as it runs."""


class ARBHfQuantizer(HfQuantizer):
    """Loads, binarizes and saves models for transformers; users meet it through `from_pretrained` alone.

    Attributes:
        selection: which linears are binarized, and why the others are not.
        records: name of a binarized module -> what is known of how it was made.
        kept: name of what stayed in float -> the reason.
        reproduce: what it takes to repeat the run that binarized the model, as far as that is known.
    """

    requires_calibration = False
    serialized_names: dict[str, list[str]] = {  # noqa: RUF012 (as the base class declares it)
        "weight": ["weight", *COMPANIONS]
    }

    def __init__(self, quantization_config: ARBConfig, **kwargs: Any):
        # the user's own object must not change, or it could not be used for a second model
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.quantization_config: ARBConfig
        self.selection = Selection()
        self.records: dict[str, Record] = {}
        self.kept: dict[str, str] = {}
        self.reproduce: dict[str, Any] | None = None
        self.failure: Exception | None = None
        # reads and writes the model layer by layer while it is binarized; then no weights are loaded before
        self.stream: Stream | None = None
        self._refinement: dict[str, Any] | None = None
        self._error_correction = 0.0  # what the walk did of what the configuration asks for
        self._device_map: Any = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._tokens: torch.Tensor | CalibrationInputs | None = None
        requested = self.quantization_config.__dict__.pop("requested", None)
        if self.pre_quantized and requested is not None:
            self._refuse_second_quantization(requested)

    @property
    def calibrates(self) -> bool:
        return not self.pre_quantized and self.quantization_config.dataset is not None

    # Before the weights load

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            check_no_disk(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        if not self.calibrates:
            return device_map
        self._device_map = device_map
        return {"": torch.device("cpu")}

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Asked by older versions of transformers, which have no `update_attn_implementation`."""
        if self.pre_quantized:
            check_config(config)
        parent = getattr(super(), "update_tp_plan", None)
        return config if parent is None else parent(config)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """As the base class; the last place before the model is built from a configuration that may be anyone's."""
        if self.pre_quantized:
            check_config(config)
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            prepare(model, pre_quantized=False)
        self.selection = select_modules(model, config, strict=not self.pre_quantized)
        self.kept = dict(self.selection.keep)
        if self.pre_quantized:
            self._expect_stored_modules(model, checkpoint_files)
            self._dtypes = expected_dtypes(model)
            self._shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
            prepare(model, pre_quantized=True)
            return
        self._leave_out_new_modules(model, checkpoint_files)
        if self.calibrates:
            with torch.device("cpu"):  # transformers builds the model under the meta device
                self._tokens = model_tokens(model, config, checkpoint_files)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized or self.calibrates or self.stream is not None:
            return False
        return self.selection.by_parameter(param_name) is not None

    def get_quantize_ops(self) -> BinarizeOnLoad:
        return BinarizeOnLoad(self)

    def update_weight_conversions(self, weight_conversions: list, *args: Any, **kwargs: Any) -> list:
        """The model's conversions, and the same for the companions of its packed experts."""
        return conversions_for_loading(weight_conversions, self._packed_experts)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element, for placing a model by its size: of the packed form where there will be one."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        name = self.selection.by_parameter(param_name)
        assert name is not None
        config = self.selection.convert[name]
        if name in self.selection.experts:
            matrix = self.selection.experts[name]
            shapes3 = packed_form(matrix, config).shapes(permuted=False)
            return sum(math.prod(s) * (1 if n.endswith("weight") else 2) for n, s in shapes3.items()) / matrix.weights
        rows, columns = linear_shape(model.get_submodule(name))
        shapes = config.stored_shapes(rows, columns, permuted=False)
        sizes = {"scale": config.resolved_scale_bits // 8, "scale_grid": 4}
        stored = sum(r * c * sizes.get(n[n.find("scale") :], 1) for n, (r, c) in shapes.items())
        return stored / (rows * columns)

    # After the weights have loaded

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failure is not None:
            raise self.failure
        if self.pre_quantized:
            localize(model)
        for module in model.modules():
            if isinstance(module, ARBLinear):
                module.decode_stored()  # transformers fills buffers that no file holds with anything
        if self.pre_quantized:
            if not any(is_divided(module) for module in model.modules()):  # a device has a part of a shape
                check_shapes(model, self._shapes)
            cast_loaded(model, self._dtypes)
            self._prepare_saving(model)
            for module in model.modules():
                if isinstance(module, (ARBLinear, ARBExperts)):
                    packed = module.packed_names() if isinstance(module, ARBExperts) else None
                    for key, parameter in module.named_parameters(recurse=False):
                        # transformers lets every float tensor that it loads require a gradient
                        parameter.requires_grad_(key == "bias" if packed is None else key not in packed)
            share_inputs(model)
            return model
        if self.calibrates or self.stream is not None:
            self._walk(model)
        self._keep_what_is_not_binarized()
        self._prepare_saving(model)
        self._record_run(model)
        if self._tokens is not None and self.stream is None:
            place_model(model, self._device_map, self.quantization_config.max_memory, current_ranks())
        self._tokens = None
        if self.stream is None:
            share_inputs(model)
        report = model_report(model)
        logger.log(logging.WARNING if self._lost(report.kept) else logging.INFO, report.summary())
        return model

    @property
    def _packed_experts(self) -> list[str]:
        """The names of the parameters that hold the packed signs of experts."""
        return [name for name in self.selection.experts if name in self.records]

    def _prepare_saving(self, model: PreTrainedModel) -> None:
        conversions: Any = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            saving = conversions_for_saving(conversions, self._packed_experts)
            model._weight_conversions = saving  # type: ignore[assignment]

    def _walk(self, model: PreTrainedModel) -> None:
        """Binarizes the loaded model, or the one that `stream` loads, layer by layer."""

        def binarize(name: str, module: nn.Module, hessian: torch.Tensor | None, tokens: int):
            packed, record = binarize_linear(name, module, self.selection.convert[name], hessian, tokens)
            self.records[name] = record
            return packed, record.output_error

        def binarize_layer(name: str, module: nn.Module, routed: RoutedInputs | None):
            packed, records = binarize_experts(name, module, routed, self.selection.of_experts(name), ranks)
            self.records.update({f"{name}.{key}": record for key, record in records.items()})
            return packed, [r.output_error for r in records.values() if r.output_error is not None]

        def measure(name: str, module: nn.Module, packed: nn.Module, statistics: LayerStatistics):
            for found, error, count in held_out_errors(name, module, packed, statistics):
                self.records[found] = replace(self.records[found], held_out_error=error, held_out_tokens=count)

        config = self.quantization_config
        batches: list[Any] = []
        held_out = 0
        if self._tokens is not None:
            length = self._tokens.shape[1] if isinstance(self._tokens, torch.Tensor) else 1
            batches, held_out = split_batches(
                self._tokens, config.held_out_samples, refinement_batch_size(config, length)
            )
        ranks = current_ranks()
        device = calibration_device(self._device_map, ranks)
        model.eval()
        names = self.selection.modules()
        if config.target_bits_per_weight is not None and self.stream is None:  # which refuses it
            self._divide_budget(model, batches[: len(batches) - held_out], device, ranks)
        refiner = None if config.refine is None else Refiner(config, self.records)
        own: dict[str, Any] = {"binarize_experts": binarize_layer, "ranks": ranks, "records": self.records}
        own |= {"held_out": held_out, "measure": measure, "error_correction": config.resolved_error_correction}
        own |= {"must_correct": bool(config.error_correction)}
        if ranks.size > 1:
            if refiner is not None:
                raise ValueError(
                    f"refine={config.refine!r} runs in one process, and {ranks.size} were started: each of them sees "
                    "a part of the calibration samples alone. Start one process, or set refine=None."
                )
            ranks.check_same(self._facts(model))
        if refiner is not None:
            own |= {"after_layer": refiner, "follow_float": True}
            refiner.check(model, names, batches, len(batches) - held_out)
        if self.stream is None:
            walk = CalibrationWalk(model, names, binarize, batches, device, **own)
            walk.run()
            if refiner is not None:
                refiner.finish(walk)
        else:
            record = None if self._tokens is None else calibration_record(config, self._tokens)
            with self.stream.opened(model, self, record) as options:
                walk = CalibrationWalk(model, names, binarize, batches, **own, **options)
                walk.run()
        found = dict(self.records)
        self.records.clear()  # filled by several threads: in an order of its own again
        self.records.update({name: found[name] for name in self.selection.convert if name in found} | found)
        self._error_correction = walk.error_correction
        if refiner is not None:
            self._refinement = refiner.summary(walk)

    def _divide_budget(self, model: PreTrainedModel, batches: list[Any], device: torch.device, ranks: Ranks) -> None:
        """Chooses the size of each linear, and records it as overrides."""
        config = self.quantization_config
        if ranks.size > 1:
            raise ValueError(
                f"target_bits_per_weight={config.target_bits_per_weight} is divided in one process, and {ranks.size} "
                "were started: take the overrides from the configuration of a model that one process has made."
            )
        config.overrides |= divide_budget(model, self.selection, config, batches, device)
        if config.method == AUTO:
            config.method = "arb-hrc"  # of no linear here: each has its own among the overrides
        for name in self.selection.convert:
            choices = config.for_module(name)
            assert choices is not None
            self.selection.convert[name] = choices

    def _facts(self, model: PreTrainedModel) -> dict[str, Any]:
        """What all processes must have in common that binarize a model together."""
        config, tokens = self.quantization_config, self._tokens
        record = {} if tokens is None else calibration_record(config, tokens)
        choices = {key: value for key, value in config.to_dict().items() if key != "dataset"}
        return {
            "version of optimum_arb": __version__,
            "version of torch": torch.__version__,
            **choices,
            "set of calibration tokens (their SHA-256)": record.get("fingerprint"),
            "model": model_fingerprint(model),
        }

    def _record_run(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if not self.records:
            raise ValueError("Nothing was binarized: the checkpoint holds none of the weights that were selected.")
        config.bits_per_weight = model_report(model).bits_per_weight
        config.optimum_arb_version = __version__
        source = model.config
        config.base_model = base_model_facts(
            source.name_or_path, getattr(source, "_commit_hash", None), config.base_model
        )
        converted = {name: c for name, c in self.selection.convert.items() if name in self.records}
        done = Selection(converted, self.kept, self.selection.experts)
        config.modules_to_not_convert = resolved_skips(done) or None
        config.calibration = None
        if self._tokens is not None:
            unreached = sorted(name for name, record in self.records.items() if not record.tokens)
            config.calibration = {**calibration_record(config, self._tokens), "unreached": unreached}
            gains = {name: r.hadamard_gain for name, r in self.records.items() if r.hadamard_gain is not None}
            if gains:
                config.calibration["untransformed"] = sorted(name for name, gain in gains.items() if gain <= 1)
            config.calibration["error_correction"] = self._error_correction
            if self._refinement is not None:
                config.calibration["refinement"] = self._refinement
            config.dataset = config.calibration["dataset"]
        facts = model_facts(source.name_or_path, getattr(source, "_commit_hash", None)) if source.name_or_path else {}
        if facts and Path(facts["name"]).is_dir():
            facts["name"] = Path(facts["name"]).name  # a path of this machine says nothing to others
        self.reproduce = reproduce_block({"base": facts} if facts else None, None, config.seed, whole_paths=False)

    def _leave_out_new_modules(self, model: PreTrainedModel, checkpoint_files: list[str] | None) -> None:
        """Leaves out what the checkpoint lacks: transformers initializes it at random, to be trained."""
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            names = KeyMap(model)
            stored = {name for key in read_headers(checkpoint_files) for name in names.names(key)}
            for name in list(self.selection.convert):
                needed = {self.selection.parameter(name)}
                if name in self.selection.experts:  # of packed experts, nothing initializes the rest
                    owner = name.rpartition(".")[0]
                    needed = {other for other in names.expected if other.rpartition(".")[0] == owner}
                if not needed <= stored:
                    del self.selection.convert[name]
                    self.kept[name] = NOT_STORED

    def _keep_what_is_not_binarized(self) -> None:
        self.kept |= {name: NOT_STORED for name in self.selection.convert if name not in self.records}

    @staticmethod
    def _lost(kept: dict[str, str]) -> bool:
        """Whether something stayed in float that a user would expect to be binarized."""
        return any("not supported" in reason or reason == NOT_STORED for reason in kept.values())

    # A checkpoint that is binarized already

    def _refuse_second_quantization(self, requested: dict[str, Any]) -> None:
        stored = self.quantization_config
        for key, value in requested.items():
            found = getattr(stored, key, None)
            if value != found:
                raise ValueError(
                    f"This model is already binarized with method={stored.method!r}, {key}={found!r}: it cannot "
                    f"be binarized again with {key}={value!r}. Start from the float model, or load this one "
                    "without a quantization_config (or with one that says nothing but `backend`)."
                )

    def _expect_stored_modules(self, model: PreTrainedModel, checkpoint_files: list[str] | None) -> None:
        if not checkpoint_files or not all(str(f).endswith(".safetensors") for f in checkpoint_files):
            raise ValueError("A binarized model is loaded from safetensors files; this checkpoint has none.")
        check_files(checkpoint_files, model.config.name_or_path or "")
        headers = read_headers(checkpoint_files)
        names = KeyMap(model)
        experts = packed_experts(headers, names, self.selection.experts)
        stored = {names.module(linear.key): linear for linear in packed_linears(headers)}
        stored = {name: linear for name, linear in stored.items() if name not in experts}
        if not stored and not experts:
            raise ValueError("The quantization_config says that the model is binarized, but no tensor is packed.")
        every = {*stored, *experts}
        names.check_complete(headers, every, self.selection)
        check_other_tensors(model, names, headers, every)
        columns: dict[str, int] = {}
        for name, linear in stored.items():
            module = names.find(name)
            if module is None:
                continue  # a part of the saved model that this class does not have
            self._check_selected(name, module)
            config = self.quantization_config.for_module(linear.key) or self.selection.convert[name]
            check_permuted(linear, name, config, self.quantization_config.calibration)
            packed = empty_linear(module, **describe(linear, config, *linear_shape(module)))
            packed.train(module.training)
            model.set_submodule(name, packed)
            self.records[name] = Record(config.method)
            columns[f"{linear.key}.weight_salient_columns"] = packed.in_features
        for name, found in experts.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            self._check_selected(name, module)
            config = self.quantization_config.for_module(found.key, found.module) or self.selection.convert[name]
            description = describe_experts(found, config, self.selection.experts[name])
            layer = module if isinstance(module, ARBExperts) else ARBExperts(module, config.backend)
            layer.set_empty(key, **description)
            model.set_submodule(owner, layer)
            self.records[name] = Record(config.method, experts=found.matrix.experts)
            columns |= dict.fromkeys(found.tensors.get("salient_columns", ()), found.matrix.in_features)
        if not self.records:
            check_same_kind(model, names, headers)
        check_indices(checkpoint_files, columns)
        self._verify(checkpoint_files)
        check_scales(checkpoint_files)
        self._keep_what_is_not_binarized()
        beside = read_report(os.path.dirname(os.path.abspath(checkpoint_files[0])))
        if beside is not None:
            self.records = restore_records(self.records, beside)
            self.reproduce = beside["reproduce"]

    def _verify(self, checkpoint_files: list[str]) -> None:
        if skipped(self.quantization_config.verify_checksums):
            return
        if verify(checkpoint_files, self.quantization_config.to_dict()) is None:
            logger.info(
                "%s records no checksums: an older optimum-arb saved it, or another tool wrote it anew. Its tensors "
                "were not verified; saving the model again records them.",
                checkpoint_files[0],
            )

    def _check_selected(self, name: str, module: nn.Module) -> None:
        if name not in self.selection.convert:
            reason = self.selection.keep.get(name, f"it is a {type(module).__name__}")
            raise ValueError(f"{name}: packed in the checkpoint, but the model keeps it in float ({reason}).")

    # What transformers asks

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        """What is saved, where it is not what this rank holds (see `tensor_parallel.whole_state_dict`), and room for
        the checksums in the metadata of every file that is written."""
        single = sum(1 for _ in model.state_dict())
        experts = (m for m in model.modules() if isinstance(m, ARBExperts))
        stacked = sum(2 * p.shape[0] for module in experts for p in module.parameters(recurse=False))
        return whole_state_dict(model), placeholder(single + stacked, self.quantization_config.to_dict())

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = dtype or model.dtype
        if isinstance(dtype, str):  # as `save_pretrained` leaves it in the model's configuration
            dtype = getattr(torch, dtype)
        kinds = (ARBLinear, ARBExperts)
        packed = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
        for name, module in packed:
            if any(p.is_meta for p in module.parameters()):
                raise ValueError(f"{name} is offloaded: load the model without offloading to dequantize it.")
            if is_divided(module):
                raise ValueError(f"{name} is divided over ranks: load it without distributed_config to dequantize it.")
        for name, module in packed:
            plain = module.float_module(dtype) if isinstance(module, ARBExperts) else float_linear(module, dtype)
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:
                from accelerate.hooks import add_hook_to_module

                plain = add_hook_to_module(plain, hook)
            model.set_submodule(name, plain)
        return model
