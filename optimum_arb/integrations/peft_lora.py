"""What PEFT does to packed layers, with errors that say what to do. Imports PEFT: see `peft.py` for what users call.

PEFT takes an `ARBLinear` for the `nn.Linear` that it is a subclass of. Everything that only adds to the layer's output
works so; whatever reads or writes `base_layer.weight` would meet packed bits instead: at best an obscure error about
shapes, at worst a weight that is silently destroyed (IA3 merged would multiply it by a vector) or an adapter that does
nothing (Uni-LoRA keeps its scales in the weight's dtype, of packed bits whole numbers).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import other as trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..nn import ARBExperts, ARBLinear

MERGE_REMEDY = (
    "Use optimum_arb.integrations.peft: merge_dequantized(model) gives a float model with the adapter merged exactly, "
    "merge_rebinarized(model) binarizes the merged weights again and reports the error."
)
# Initializations that read no weight of the base layer.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
# Variants of LoRA that read the base layer's weight, or make their own weights in its dtype.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
# Adapters other than LoRA that read the base layer's weight, or make their own weights in its dtype (PEFT 0.21).
_READ_THE_WEIGHT = (
    "ADAMSS",
    "DEFT",
    "DELORA",
    "FROD",
    "GLORA",
    "HIRA",
    "HRA",
    "LOHA",
    "LOKR",
    "OSF",
    "PEANUT",
    "PSOFT",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
)


class PackedLoraLinear(lora_layer.Linear):
    """PEFT's LoRA layer around an `ARBLinear`."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As PEFT's own.

        Raises:
            ValueError: a variant or an initialization that needs the float weight.
        """
        if isinstance(self.get_base_layer(), ARBLinear):
            check_lora_config(config, kwargs.get("target_name", ""))
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's own, once the base layer is a float one.

        Raises:
            ValueError: the base layer is packed.
        """
        base = self.get_base_layer()
        if isinstance(base, ARBLinear):
            raise ValueError(f"An adapter cannot be merged into the packed bits of a binarized layer. {MERGE_REMEDY}")
        self.fan_in_fan_out = isinstance(base, Conv1D)  # the class that GPT-2's packed layers are dequantized to
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


def check_lora_config(config: Any, module: str = "") -> None:
    """Whether LoRA of this configuration can be added to a packed layer.

    Args:
        config: a `LoraConfig`.
        module: the layer's name, for the error.

    Raises:
        ValueError: it needs the float weight.
    """
    where = f"{module}: " if module else ""
    for key, name in _VARIANTS.items():
        if getattr(config, key, None):
            raise ValueError(
                f"{where}{name} ({key}) needs the float weight of the layer, and this one is binarized: its weight is "
                f"packed bits. Use plain LoRA ({key} left out; use_rslora works), or call model.dequantize() first and "
                "train on the float model."
            )
    initialization = getattr(config, "init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise ValueError(
            f"{where}init_lora_weights={initialization!r} needs the float weight of the layer, and this one is "
            "binarized: its weight is packed bits. Use True, False, 'gaussian', 'orthogonal' or 'eva', or call "
            "model.dequantize() first."
        )


def check_target(config: Any, target: nn.Module, name: str, parameter: str | None = None) -> None:
    """Whether an adapter can be added to a module, as far as it is packed.

    Args:
        config: a `PeftConfig`.
        target: the module, or PEFT's layer around it.
        name: the module's name, for the error.
        parameter: of `target_parameters`, the parameter that the adapter is for.

    Raises:
        ValueError: it needs the float weight.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, (ARBLinear, ARBExperts)):
        return
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if parameter is not None:
        kind = "an adapter of a parameter (target_parameters)"
    elif kind not in _READ_THE_WEIGHT:
        return
    raise ValueError(
        f"{name}: {kind} needs the float weight of the layer, and this one is binarized: its weight is packed bits. "
        "Use LoRA on linears (target_modules), or call model.dequantize() first and train on the float model."
    )


def check_modules_to_save(model: nn.Module, modules: Iterable[str] | None) -> None:
    """Whether PEFT can train copies of modules, as far as these are packed.

    Args:
        model: whose modules they are.
        modules: ends of their names: `modules_to_save` of a `PeftConfig`.

    Raises:
        ValueError: one of them is packed, or holds a packed one.
    """
    ends = tuple(modules or ())
    for name, module in model.named_modules():
        if not name.endswith(ends):
            continue
        for inner, child in module.named_modules():
            # PEFT's own layer has the name that a user knows
            base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
            if isinstance(base, (ARBLinear, ARBExperts)):
                packed = f"{name}.{inner}" if inner else name
                raise ValueError(
                    f"{packed}: modules_to_save={list(ends)} would train a copy of it, and it is binarized: packed "
                    "bits have no gradient. Take it out of modules_to_save and train adapters on "
                    "linears (target_modules), keep it in float when the model is binarized "
                    f"(ARBConfig(modules_to_not_convert=[{packed.rpartition('.')[2]!r}])), or call model.dequantize() "
                    "first."
                )


def packed_adapters(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The adapter layers of a model whose base layer is packed, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), ARBLinear):
            yield name, module


def register() -> None:
    """Makes PEFT use `PackedLoraLinear`, and refuse adapters that read packed bits as a weight, to merge any into them
    and to train them; once is enough."""
    plain = lora_model.dispatch_default
    if getattr(plain, "_optimum_arb", False):
        return

    def dispatch(target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, ARBLinear) and parameter_name is None:
            # as PEFT has it for `nn.Linear`; GPT-2's packed layers too have the inputs as columns
            config.fan_in_fan_out = False
            return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
        return plain(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)

    dispatch._optimum_arb = True  # type: ignore[attr-defined]
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # before anything is changed
        check_modules_to_save(model, getattr(self.peft_config[adapter_name], "modules_to_save", None))
        create: Any = self._create_and_replace  # each kind of adapter has its own

        def checked(config: Any, adapter_name: str, target: nn.Module, *more: Any, **named: Any) -> None:
            check_target(config, target, named["current_key"], named.get("parameter_name"))
            create(config, adapter_name, target, *more, **named)

        setattr(self, "_create_and_replace", checked)  # noqa: B010 (declared as a method)
        try:
            inject(self, model, adapter_name, *args, **kwargs)
        finally:
            del self._create_and_replace

    allowed = BaseTuner._check_merge_allowed

    def check_merge_allowed(self: BaseTuner) -> None:
        allowed(self)
        # before anything is merged, so that no half-merged model is left behind
        for name, _ in packed_adapters(self.model):
            raise ValueError(
                f"{name}: an adapter cannot be merged into the packed bits of a binarized layer. {MERGE_REMEDY}"
            )

    set_trainable = trainable._set_trainable

    @functools.wraps(set_trainable)
    def checked_trainable(model: nn.Module, adapter_name: str, module_names: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("wrapper_cls") in (None, trainable.ModulesToSaveWrapper):
            check_modules_to_save(model, module_names)  # of prompts to learn, which inject nothing
        return set_trainable(model, adapter_name, module_names, *args, **kwargs)

    lora_model.dispatch_default = dispatch
    trainable._set_trainable = checked_trainable
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]
    BaseTuner._check_merge_allowed = check_merge_allowed  # type: ignore[method-assign]
