"""The names of a checkpoint's tensors and of a model's: transformers' renamings, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

from ..modules import Selection
from .linears import COMPANIONS
from .tensors import StoredTensor


class KeyMap:
    """Maps the keys of a checkpoint to the names of a model, as transformers does when it loads.

    Args:
        model: the model before its linears are replaced.
        conversions: of its checkpoint, where they are at hand; they note which of them a key took.
    """

    def __init__(self, model: PreTrainedModel, conversions: Sequence[WeightTransform] | None = None):
        self._model = model
        self._expected = model.state_dict()
        conversions = get_model_conversion_mapping(model) if conversions is None else conversions
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    @property
    def expected(self) -> set[str]:
        """The tensors of the model."""
        return set(self._expected)

    def names(self, key: str) -> list[str]:
        """The tensors of the model that a key of the checkpoint becomes (part of)."""
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._expected)
        if name not in self._expected and key in self._expected:
            name, pattern = rename_source_key(key, [], [], prefix, self._expected)
        if pattern is None:
            return [name]
        targets = self._by_pattern[pattern].target_patterns
        return [name.replace(targets[0], target) for target in targets]

    def saved(self, key: str) -> str:
        """The tensor that a key of the checkpoint becomes, with the prefix that the class which was saved had."""
        return rename_source_key(key, self._renamings, self._converters)[0]

    def is_converted(self, key: str) -> bool:
        """Whether transformers makes a tensor of other shape or values of what is stored."""
        return rename_source_key(key, self._renamings, self._converters)[1] is not None

    def module(self, stem: str) -> str:
        """The model's name of the linear that the checkpoint calls `stem`."""
        return self.names(f"{stem}.weight")[0].removesuffix(".weight")

    def find(self, name: str) -> nn.Module | None:
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            return None

    def check_complete(
        self, headers: Mapping[str, StoredTensor], packed: Collection[str], selection: Selection
    ) -> None:
        """Whether the checkpoint holds all of the model, with everything packed that the selection binarizes.

        A part of the model that the saved class did not have (a task head, a pooler) may be absent as a whole:
        transformers initializes it and says so.

        Args:
            headers: of all tensors of the checkpoint.
            packed: names of the linears and of the experts' matrices that are packed there.
            selection: what the configuration says is binarized.

        Raises:
            ValueError: a tensor is missing, or a linear is there in float; the message names it.
        """
        stored = {}
        for key, header in headers.items():
            if key.rpartition(".")[2] not in COMPANIONS:
                stored.update(dict.fromkeys(self.names(key), header))
        for name in selection.convert:
            weight = selection.parameter(name)
            if name not in packed and weight in stored:
                raise ValueError(
                    f"{name}: the quantization_config says that it is binarized, but the checkpoint holds its weight "
                    f"as {stored[weight]}. The configuration or the checkpoint was changed."
                )
        tied = set(getattr(self._model, "all_tied_weights_keys", None) or {})
        optional = [*(self._model._keys_to_ignore_on_load_missing or ()), *(self._model._keys_to_ignore_on_save or ())]
        parts = {self._part(name) for name in stored}
        same_class = type(self._model).__name__ in (self._model.config.architectures or ())
        for name in self._expected:
            module = name.rpartition(".")[0]
            if name in stored or name in tied or any(re.search(pattern, name) for pattern in optional):
                continue
            if name == f"{module}.weight" and module in packed:
                continue  # its other tensors are there: `describe` says what is missing
            if not same_class and self._part(name) not in parts:
                continue
            others = (key for key in headers if key.split(".")[-2:] == name.split(".")[-2:])
            other = next((key for key in others if not self.expected.intersection(self.names(key))), None)
            if other is not None:
                raise ValueError(
                    f"{module}: the tensor {name!r} is missing in the checkpoint, which has {other!r}. A "
                    "binarized model is loaded under the names that it was saved with, without key_mapping."
                )
            raise ValueError(
                f"{module}: the tensor {name!r} is missing in the checkpoint. Save or download the model again."
            )

    def _part(self, name: str) -> str:
        """The part of the model that a tensor belongs to: the module right below the base model or the head."""
        prefix = self._model.base_model_prefix
        return name.removeprefix(f"{prefix}.").partition(".")[0]
