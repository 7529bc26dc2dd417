"""LoRA on binarized models with PEFT: what to do before training, and how to merge an adapter afterwards.

Training itself needs nothing of this module: `get_peft_model`, `add_adapter`, `Trainer` and `PeftModel.from_pretrained`
work on a binarized model as on any other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..algorithms import output_error
from ..calibration import CalibrationWalk, model_tokens, token_batches
from ..calibration.data import calibration_record
from ..config import ARBConfig
from ..conversion import Record, binarize_linear, float_linear
from ..nn import ARBExperts, ARBLinear, share_inputs
from ..report import model_report
from .merge_report import MergeReport, ModuleMerge

__all__ = ["MergeReport", "ModuleMerge", "merge_dequantized", "merge_rebinarized", "prepare_for_training"]


def prepare_for_training(
    model: PreTrainedModel,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    float32: bool = True,
) -> PreTrainedModel:
    """Freezes a binarized model and makes it ready for adapters; to be called before `get_peft_model`.

    In place of PEFT's `prepare_model_for_kbit_training`, which does not know this method: it would widen the stored
    scales to float32 and leave gradient checkpointing off.

    Args:
        model: a binarized model, without adapters.
        gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: of `torch.utils.checkpoint`; `use_reentrant` is False if not given.
        float32: widen what is not binarized (norms, embeddings, the output layer) to float32, as PEFT's helper does,
            which is steadier to train than half precision. The packed layers take inputs of any dtype.

    Returns:
        The same model.

    Raises:
        ValueError: no layer of the model is binarized, or it has adapters already.
    """
    packed: set[int] = set()
    for module in model.modules():
        if isinstance(module, ARBLinear):
            packed.update(id(parameter) for parameter in module.parameters())
        elif isinstance(module, ARBExperts):
            packed.update(id(module.get_parameter(name)) for name in module.packed_names(*module.forms))
    if not packed:
        raise ValueError(f"{type(model).__name__} has no binarized module; for a float model use PEFT's own helpers.")
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters already: call prepare_for_training before adding them.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if float32 and parameter.is_floating_point() and id(parameter) not in packed:
            parameter.data = parameter.data.to(torch.float32)
    if gradient_checkpointing:
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            # a reentrant checkpoint passes no gradient on where none of its inputs needs one, and the base is frozen
            model.enable_input_require_grads()
        # named activation_checkpointing_enable since transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs)
    return model


def merge_dequantized(
    model: nn.Module, dtype: torch.dtype | None = None, adapter_names: str | Sequence[str] | None = None
) -> PreTrainedModel:
    """A plain float model with the adapters merged: nothing is lost but the small size. Works in place.

    Args:
        model: a binarized model with adapters: a `PeftModel`, or a model of transformers after `add_adapter`.
        dtype: of the dequantized weights; None is the dtype that the model was loaded in.
        adapter_names: which adapters; None merges the active ones. The others are dropped.

    Returns:
        The model without PEFT around it.

    Raises:
        ValueError: the model has no adapter of this name, or none at all.
    """
    base = _base_model(model)
    _activate(model, adapter_names)
    if getattr(base, "is_quantized", False):
        base.dequantize(dtype)
    return _unload(model)


@torch.no_grad()
def merge_rebinarized(
    model: nn.Module,
    dataset: Any = None,
    tokenizer: Any = None,
    adapter_names: str | Sequence[str] | None = None,
    num_samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int | None = None,
) -> tuple[PreTrainedModel, MergeReport]:
    """A binarized model with LoRA adapters merged: each merged weight is binarized again. Works in place.

    One bit a weight cannot hold a small change exactly: look at the report, measure the model, and keep the adapter
    beside the binarized model if it has lost too much.

    Args:
        model: a binarized model with LoRA adapters: a `PeftModel`, or a model of transformers after `add_adapter`.
        dataset: calibration text, as `ARBConfig.dataset`; the model then runs layer by layer as when it was first
            binarized. None looks at the weights alone, which is quick and a good deal worse.
        tokenizer: the model's; None looks for it where the model was loaded from.
        adapter_names: which adapters; None merges the active ones. The others are dropped.
        num_samples: calibration sequences.
        sequence_length: tokens of a calibration sequence.
        batch_size: sequences of a calibration batch; None lets the sequence length choose.

    Returns:
        The model without PEFT around it, ready for `save_pretrained`, and the errors of its layers.

    Raises:
        ValueError: there is no adapter on a packed layer, an adapter there is not plain LoRA, or, with a dataset, the
            model is spread over several devices.
    """
    from .peft_lora import PackedLoraLinear, packed_adapters

    base: Any = _base_model(model)
    _activate(model, adapter_names)
    layers: dict[str, Any] = dict(packed_adapters(base))
    if not layers:
        raise ValueError("No packed layer has an adapter. For adapters on float layers use PEFT's merge_and_unload.")
    for name, layer in layers.items():
        variants = getattr(layer, "lora_variant", {})
        if not isinstance(layer, PackedLoraLinear) or any(active in variants for active in layer.active_adapters):
            raise ValueError(
                f"{name}: only plain LoRA can be merged by binarizing again, not {type(layer).__name__} of this kind. "
                "Use merge_dequantized."
            )
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        raise ValueError("The model was not loaded through from_pretrained: its quantization_config is unknown.")
    config = _calibration_config(quantizer.quantization_config, dataset, num_samples, sequence_length, batch_size)
    results: list[ModuleMerge] = []

    def binarize(name: str, layer: nn.Module, hessian: torch.Tensor | None, tokens: int):
        assert isinstance(layer, PackedLoraLinear)
        choices = config.for_module(name) or config
        packed, record, result = _binarize_merged(name, layer, choices, hessian, tokens)
        results.append(result)
        quantizer.records[name] = record
        return packed, record.output_error

    training = base.training
    base.eval()
    tokens = None
    if dataset is None:
        for name, layer in layers.items():
            base.set_submodule(name, binarize(name, layer, None, 0)[0])
    else:
        device = _single_device(base)
        tokens = model_tokens(base, config, tokenizer=tokenizer)
        base.to("cpu")
        CalibrationWalk(base, list(layers), binarize, token_batches(tokens, 1), device).run()
        base.to(device)
    merged = _unload(model).train(training)
    for module in merged.modules():
        if isinstance(module, ARBLinear):  # the groups of before hold layers that are no longer there
            module.first_product.share(None)
            module._drop_dequantized()
    share_inputs(merged)
    stored = quantizer.quantization_config
    stored.bits_per_weight = model_report(merged).bits_per_weight
    unreached = (stored.calibration or {}).get("unreached")
    if tokens is not None:
        stored.calibration = calibration_record(config, tokens)
        stored.dataset = stored.calibration["dataset"]
    if stored.calibration is not None and (tokens is not None or unreached is not None):
        # linears without the order of columns that calibration gives: loading would take it for lost
        linears = {name: m for name, m in merged.named_modules() if isinstance(m, ARBLinear)}
        ordered = {name for name in linears if (own := stored.for_module(name)) and own.resolved_act_order}
        plain = {name for name in ordered if linears[name].packed_parameter("permutation") is None}
        others = {name for name in unreached or () if tokens is None or name not in layers}
        stored.calibration = {**stored.calibration, "unreached": sorted(plain | others)}
        if any(module.hadamard for module in linears.values()):
            untransformed = sorted(name for name, module in linears.items() if not module.hadamard)
            stored.calibration["untransformed"] = untransformed
    order = {name: index for index, name in enumerate(layers)}
    results.sort(key=lambda result: order[result.name])
    return merged, MergeReport(tuple(results), calibrated=dataset is not None)


def _binarize_merged(
    name: str, layer: Any, config: ARBConfig, hessian: torch.Tensor | None, tokens: int
) -> tuple[ARBLinear, Record, ModuleMerge]:
    """The packed weight with the active adapters in it: a new fit, or the one of before if that is nearer."""
    before: ARBLinear = layer.get_base_layer()
    merged: Any = float_linear(before, torch.float32)
    weight = merged.weight.detach()
    bias = None if before.bias is None else before.bias.detach().clone()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            delta = layer.get_delta_weight(adapter).detach().to(weight.device, torch.float32)
            weight += delta.T if isinstance(merged, Conv1D) else delta
            if layer.lora_bias[adapter]:
                if bias is None:
                    raise ValueError(f"{name}: lora_bias=True cannot be merged, the layer has no bias.")
                bias += (layer.lora_B[adapter].bias * layer.scaling[adapter]).to(bias)
    merged.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    packed, record = binarize_linear(name, merged, config, hessian, tokens)
    target = weight.T if isinstance(merged, Conv1D) else weight
    old_error = output_error(target, before.dequantize(), hessian)
    new_error = record.weight_error if record.output_error is None else record.output_error
    assert new_error is not None
    if old_error > new_error:
        return packed, record, ModuleMerge(name, new_error, old_error, True)
    before.register_parameter("bias", merged.bias)
    weight_error = output_error(target, before.dequantize(), None)
    record = Record(config.method, weight_error, None if hessian is None else old_error, tokens)
    return before, record, ModuleMerge(name, old_error, old_error, False)


def _calibration_config(stored: ARBConfig, dataset: Any, samples: int, length: int, batch: int | None) -> ARBConfig:
    """The model's own choices with another calibration set."""
    given = ARBConfig(dataset=dataset, num_samples=samples, sequence_length=length, batch_size=batch)
    config = copy.copy(stored)
    for key in ("dataset", "num_samples", "sequence_length", "batch_size"):
        setattr(config, key, getattr(given, key))
    return config


def _single_device(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ValueError(
            "A model that is spread over several devices cannot be calibrated after merging. Load it on one device, or "
            "with device_map='cpu'."
        )
    return devices.pop()


def _base_model(model: Any) -> PreTrainedModel:
    """The model of transformers inside a `PeftModel`, or the model itself."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, BaseTuner):
            raise ValueError("This adapter lies beside the layers (a learned prompt) and cannot be merged into them.")
        return model.base_model.model
    if not isinstance(model, PreTrainedModel) or not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{type(model).__name__} has no adapter to merge.")
    return model


def _activate(model: Any, adapter_names: str | Sequence[str] | None) -> None:
    """Makes some adapters the active ones."""
    if adapter_names is None:
        return
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"There is no adapter {name!r}: the model has {', '.join(model.peft_config)}.")
    from peft import PeftModel

    owner: Any = model.base_model if isinstance(model, PeftModel) else model
    owner.set_adapter(names)


def _unload(model: Any) -> PreTrainedModel:
    """Merges the active adapters into the float layers that still have some, and takes PEFT away."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        return tuner.merge_and_unload(safe_merge=True)
    wrappers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    for name, module in wrappers:
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        model.set_submodule(name, plain)
    with suppress(AttributeError):
        del model.peft_config
    model._hf_peft_config_loaded = False
    return model
