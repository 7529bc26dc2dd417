"""`ARBHfQuantizer`: the only file that knows the protocol by which transformers loads and saves a model.

Without calibration, each weight is binarized while the checkpoint streams in. With it, the model loads in float on the
CPU, is binarized layer by layer and is placed then. An already binarized checkpoint is recognised by its tensors, whose
shapes are checked before anything is allocated.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer

from .calibration import model_tokens
from .calibration.distributed import current_ranks
from .config import ARBConfig
from .conversion import Record, float_linear
from .custom_data import CalibrationInputs
from .experts.keys import conversions_for_loading, conversions_for_saving
from .experts.packing import packed_form
from .loading.calibrated import Stream, Task, binarize_model
from .loading.placement import check_no_disk, place_model
from .loading.prequantized import StoredModel, check_loaded, expect_stored
from .loading.run_record import record_run
from .loading.streaming import BinarizeOnLoad
from .modules import Selection, linear_shape, select_modules
from .nn import ARBExperts, ARBLinear, share_inputs
from .report import model_report
from .stored.checks import check_config
from .stored.checksums import placeholder
from .stored.keys import KeyMap
from .stored.linears import COMPANIONS
from .stored.tensors import read_headers
from .tensor_parallel.layers import is_divided, localize, prepare, whole_state_dict

logger = logging.getLogger(__name__)

NOT_STORED = "not in the checkpoint"


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
        self._device_map: Any = None
        self._stored: StoredModel | None = None
        self._tokens: torch.Tensor | CalibrationInputs | None = None
        # of a float model, until it is known by which conversions its checkpoint's names become the model's
        self._unnamed: tuple[PreTrainedModel, list[str] | None] | None = None
        self._key_mapping: list = []
        self._directory: Path | None = None  # of the checkpoint
        requested = self.quantization_config.__dict__.pop("requested", None)
        if self.pre_quantized and requested is not None:
            self._refuse_second_quantization(requested)

    @property
    def calibrates(self) -> bool:
        return not self.pre_quantized and self.quantization_config.dataset is not None

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
        self.selection = select_modules(model, config, strict=not self.pre_quantized, stored=self.pre_quantized)
        self.kept = dict(self.selection.keep)
        if self.pre_quantized:
            self._stored = expect_stored(model, checkpoint_files, config, self.selection)
            self.records, self.reproduce = self._stored.records, self._stored.reproduce
            self._keep_what_is_not_binarized()
            prepare(model, pre_quantized=True)
            return
        self._unnamed = model, checkpoint_files
        # with `subfolder`, not the one that the model is named after
        beside = Path(checkpoint_files[0]).parent if checkpoint_files else None
        self._directory = beside if beside is not None and (beside / "config.json").is_file() else None
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
        """The model's conversions, and the same for the companions of its packed experts.

        Here `key_mapping` is among them, of which transformers tells a quantizer nothing else.
        """
        if self._unnamed is not None:
            model = self._unnamed[0]
            self._key_mapping = weight_conversions[: len(weight_conversions) - len(get_model_conversion_mapping(model))]
            self._leave_out_new_modules(*self._unnamed, weight_conversions)
            self._unnamed = None
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
        if self._stored is not None:
            check_loaded(model, self._stored)
            self._prepare_saving(model)
            share_inputs(model)
            return model
        task = Task(self.quantization_config, self.selection, self.records, self._tokens, self._device_map, self.stream)
        if self.calibrates or self.stream is not None:
            binarize_model(model, task)
        self._keep_what_is_not_binarized()
        self._prepare_saving(model)
        self.reproduce = record_run(model, task, self.kept, self._directory)
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
            # under the model's own names: to load it, nobody needs the mapping then
            conversions = [c for c in conversions if not any(c is given for given in self._key_mapping)]
            saving = conversions_for_saving(conversions, self._packed_experts)
            model._weight_conversions = saving  # type: ignore[assignment]

    def _leave_out_new_modules(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None, conversions: list
    ) -> None:
        """Leaves out what the checkpoint lacks: transformers initializes it at random, to be trained."""
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            names = KeyMap(model, copy.deepcopy(conversions))  # transformers' own note what a key took
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
