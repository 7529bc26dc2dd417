"""The names under which packed experts are stored: transformers' conversions of the float ones, for every companion.

A checkpoint holds one `w1.weight` for each expert where the model has one `gate_up_proj`; transformers stacks and joins
them by a `WeightConverter`. The packed tensors are made so that the same operations on `w1.weight_row_scale` and its
like give `gate_up_proj_row_scale`, and their reverse when the model is saved.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from ..format.packing import TENSOR_NAMES
from .matrices import ExpertMatrix

# Of the companions' names, those first that end in another one.
SUFFIXES = tuple(sorted((f"_{name}" for name in TENSOR_NAMES[1:]), key=len, reverse=True))


def split_companion(key: str) -> tuple[str, str]:
    """A tensor's name without the companion's ending, and the tensor's name in `TENSOR_NAMES` ("weight" if none)."""
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix[1:]
    return key, "weight"


class StackExperts(MergeModulelist):
    """Experts into one tensor, and back into tensors of two dimensions (before 5.21, a row came back as a vector)."""

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts(self.dim)


class SplitExperts(SplitModulelist):
    """One tensor into those of each expert, which keep dimensions of size 1."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for pattern, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            names = self.get_target_patterns(input_dict, pattern, target_patterns, tensor.shape[self.dim])
            result.update(zip(names, tensor.unbind(self.dim), strict=True))
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        return StackExperts(self.dim)


def conversions_for_loading(conversions: Iterable[WeightTransform], packed: Collection[str]) -> list[WeightTransform]:
    """The conversions of a model's checkpoint, and the same for the companions of its packed experts.

    The first that matches a key counts, and before 5.21 a pattern matches the beginning of a name: companions go first.

    Args:
        conversions: of the float model.
        packed: names of the parameters that hold packed signs.
    """
    conversions = list(conversions)
    return [*_companions(conversions, packed), *conversions]


def conversions_for_saving(conversions: Iterable[WeightTransform], packed: Collection[str]) -> list[WeightTransform]:
    """The same for a model that was loaded, to be turned round: saving goes through them from the last to the first.

    Args:
        conversions: those that were used in loading, with those of companions or without.
        packed: names of the parameters that hold packed signs.
    """
    plain = [c for c in conversions if not all(p.endswith(SUFFIXES) for p in c._original_source_patterns)]
    return [*plain, *_companions(plain, packed)]


def _companions(conversions: Iterable[WeightTransform], packed: Collection[str]) -> list[WeightTransform]:
    result: list[WeightTransform] = []
    for conversion in conversions:
        if type(conversion) not in (WeightConverter, WeightRenaming):
            continue
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        if not any(re.search(rf"{_plain(target)}$", name) for target in targets for name in packed):
            continue
        for suffix in SUFFIXES:
            names = [source + suffix for source in sources], [target + suffix for target in targets]
            copy: WeightTransform
            if isinstance(conversion, WeightConverter):
                operations = [StackExperts(o.dim) if type(o) is MergeModulelist else o for o in conversion.operations]
                copy = WeightConverter(*names, operations=operations)
            else:
                copy = WeightRenaming(*names)
            copy.scope_prefix, copy.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
            result.append(copy)
    return result


def _plain(pattern: str) -> str:
    """A regular expression of the name that a target pattern of transformers stands for."""
    return re.escape(pattern.replace("\\.", ".").removeprefix("^"))


def unsupported_conversions(model: PreTrainedModel, matrices: Mapping[str, ExpertMatrix]) -> dict[str, str]:
    """What keeps matrices of experts from being stored packed: operations by which their checkpoint is converted.

    Args:
        model: the float model.
        matrices: name of a parameter in the model -> which matrix it is.

    Returns:
        Name of a parameter -> the operation, of those that have one other than stacking the experts and joining gate
        and up.
    """
    conversions = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    turned: list[Any] = [conversion.reverse_transform() for conversion in conversions]
    found = {}
    for name, matrix in matrices.items():
        _, pattern = rename_source_key(name, [], turned, reverse=True)
        if pattern is None:
            continue
        converter = next(c for c, t in zip(conversions, turned, strict=True) if pattern in t.source_patterns)
        pieces = len(converter.source_patterns)
        if pieces not in (1, matrix.parts):
            found[name] = f"Concatenate of {pieces} tensors"
        for operation in converter.operations:
            stacks = type(operation) is MergeModulelist and operation.dim == 0
            joins = type(operation) is Concatenate and operation.dim == 1
            if not stacks and not joins:
                found[name] = type(operation).__name__
    return found
