"""Which part of a model is its language model, where it has parts for images or sound too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

REASON = "vision or audio tower (other_modalities=True binarizes it)"
_NAMES = re.compile(r"vision|visual|image|audio|speech|multi_modal|mm_")


class OtherModalities:
    """What of a model does not belong to its language model: towers, and what joins them to it.

    Args:
        model: a model of any kind.
        stored: whether it is that of a binarized checkpoint. Then names alone decide: what else stayed in float is
            listed in its `modules_to_not_convert`, and older versions took the names for all there is.
    """

    def __init__(self, model: PreTrainedModel, stored: bool = False):
        configs = list(_configs(model.config))
        self._composite = any(
            "vision" in key or "audio" in key for config in configs for key in getattr(config, "sub_configs", ())
        )
        parts = [
            (f"{name}." if name else "", part.config)
            for name, part in model.named_modules()
            if isinstance(part, PreTrainedModel)
        ]
        # The configuration tells more than names do: SmolVLM's `connector`, the `encoder` of Granite Speech. What has
        # images and a language model may itself be a part, as the encoder of T5Gemma 2 is.
        self._parts: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        for config in configs:
            if not stored and _has_language_model(config):
                whole = tuple(name for name, own in parts if own is config)
                language = tuple(name for name, own in parts if own is config.text_config)
                if language:
                    self._parts.append((whole, language))

    def __contains__(self, name: object) -> bool:
        """Whether a module belongs to another modality, by its name."""
        assert isinstance(name, str)
        if any(name.startswith(whole) and not name.startswith(language) for whole, language in self._parts):
            return True
        return self._composite and _NAMES.search(name) is not None


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for key in getattr(config, "sub_configs", ()):
        inner = getattr(config, key, None)
        if inner is not None and not isinstance(inner, dict):
            yield from _configs(inner)


def _has_language_model(config: Any) -> bool:
    """Whether a configuration has one of a language model beside others of towers. Where there are decoders or a
    backbone too (SAM 3, Grounding DINO), the text is but encoded for them."""
    keys = getattr(config, "sub_configs", ())
    return "text_config" in keys and len(keys) > 1 and not any("decoder" in k or "backbone" in k for k in keys)
