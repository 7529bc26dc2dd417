"""Makes transformers know `quant_method: "arb"`."""

from __future__ import annotations

from transformers.quantizers import auto

from .config import ARBConfig
from .hub.methods import wrap_methods
from .integrations.import_hook import after_import
from .loading.model_dtype import wrap_dtype
from .quantizer import ARBHfQuantizer


def register() -> None:
    """Registers the configuration and the quantizer; does nothing the second time."""
    if "arb" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config("arb")(ARBConfig)
    if "arb" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer("arb")(ARBHfQuantizer)
    # a closed tuple of the configurations that may be given anew when a quantized model is loaded: others are ignored
    if ARBConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        types: tuple[type, ...] = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, ARBConfig)
        setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", types)  # noqa: B010 (its declared type has a fixed length)
    wrap_methods()
    wrap_dtype()
    # a submodule that PEFT always imports: many only ask whether there is a `peft`
    after_import("peft.tuners.lora.model", _register_with_peft)


def _register_with_peft() -> None:
    from .integrations import peft_lora

    peft_lora.register()
