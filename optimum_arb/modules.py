"""Which modules of a model are binarized, and why the others stay in float."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import ARBConfig
from .experts.keys import unsupported_conversions
from .experts.matrices import ExpertMatrix, expert_matrices, is_experts
from .format.factors import stored_bits
from .modalities import REASON as OTHER_MODALITY
from .modalities import OtherModalities
from .patterns import matches

MAX_FACTOR_BITS = 16  # as of `factor_bits`
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


@dataclass
class Selection:
    """The linears of a model and the matrices of its experts, divided. The latter go by their parameter's name.

    Attributes:
        convert: name of a linear, or of a parameter with one matrix per expert, that is to be binarized -> its
            configuration, overrides applied.
        keep: name of such a one that stays in float -> the reason.
        experts: name of such a parameter -> its shape, whether it is binarized or not.
    """

    convert: dict[str, ARBConfig] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertMatrix] = field(default_factory=dict)

    def parameter(self, name: str) -> str:
        """The name of the parameter that holds the weight of an entry of `convert` or `keep`."""
        return name if name in self.experts else f"{name}.weight"

    def by_parameter(self, parameter: str) -> str | None:
        """The entry of `convert` whose weight is this parameter."""
        name = parameter if parameter in self.experts else parameter.removesuffix(".weight")
        return name if name in self.convert and self.parameter(name) == parameter else None

    def modules(self) -> list[str]:
        """The modules to be binarized, in the order of `convert`: linears, and modules of experts."""
        names = (name.rpartition(".")[0] if name in self.experts else name for name in self.convert)
        return list(dict.fromkeys(names))

    def of_experts(self, module: str) -> dict[str, ARBConfig]:
        """The matrices of a module of experts that are to be binarized: name within the module -> configuration."""
        names = (name for name in self.experts if name in self.convert and name.rpartition(".")[0] == module)
        return {name.rpartition(".")[2]: self.convert[name] for name in names}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer; by exact type, since a subclass may compute something else."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight `[N, K]` of a linear, as a view."""
    weight = module.get_parameter("weight").detach()
    return weight.T if type(module) is Conv1D else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear; GPT-2's `Conv1D` stores its weight transposed."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if type(module) is Conv1D else (rows, columns)


def select_modules(model: PreTrainedModel, config: ARBConfig, strict: bool = True, stored: bool = False) -> Selection:
    """Divides the linears of a model into those to binarize and those that stay in float.

    Output embeddings, tied weights, task heads, routers, parts for other modalities, modules that transformers keeps in
    float32 and modules whose weight is read by other code than their own forward stay in float, then what
    `modules_to_not_convert` and `overrides` say. A pattern matches the experts of a layer by their module's name or by
    a parameter's (`experts.down_proj`).

    Args:
        model: the float model; its weights are not looked at and may be on the meta device.
        config: the choices.
        strict: raise where a pattern of the configuration matches no linear of the model.
        stored: the configuration is that of a checkpoint that is binarized already.

    Raises:
        ValueError: such a pattern, or no linear is left to binarize, or experts whose method cannot binarize them, or
            a rank of more bits than a weight in half precision has.
    """
    selection = Selection()
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    experts = {name: module for name, module in model.named_modules() if is_experts(module)}
    for name, module in experts.items():
        selection.experts |= {f"{name}.{key}": matrix for key, matrix in expert_matrices(module).items()}
    if strict:
        _check_patterns(config, [*linears, *experts, *selection.experts])
    others: Container[str] = () if config.other_modalities else OtherModalities(model, stored)
    structural = _structural_reasons(model, linears, others)
    structural |= _structural_reasons_of_experts(model, selection.experts, others)
    for name, module in model.named_modules():
        if name in linears:
            choices = config.for_module(name)
            reason = structural.get(name) or _user_reason(config, choices, name)
            if reason is None and choices is not None:
                if strict:
                    _check_rank(name, module, choices)
                selection.convert[name] = choices
            elif reason is not None:
                selection.keep[name] = reason
        elif name in experts:
            for key in expert_matrices(module):
                matrix = f"{name}.{key}"
                choices = config.for_module(matrix, name)
                reason = structural.get(matrix) or _user_reason(config, choices, matrix, name)
                if reason is None and choices is not None and choices.factorized:
                    raise ValueError(
                        f"{matrix}: method={choices.method!r} does not binarize experts yet. Give them another method, "
                        "say overrides={'experts': {'method': 'arb-hrc'}}, or keep them in float with "
                        "modules_to_not_convert=['experts']."
                    )
                if reason is None and choices is not None:
                    # of experts, each with a calibration matrix of its own, no transform of the input is run
                    choices = choices.without_hadamard()
                    selection.convert[matrix] = choices
                elif reason is not None:
                    selection.keep[matrix] = reason
        elif isinstance(module, nn.Linear):
            selection.keep[name] = f"its type is {type(module).__name__}, not a plain linear"
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for key, parameter in module.named_parameters(recurse=False):
                matrices = parameter.dim() == 3 or (parameter.dim() == 2 and "expert" in name)
                if matrices and min(parameter.shape) > 1:
                    selection.keep[f"{name}.{key}"] = f"a tensor of {type(module).__name__}: not supported"
                elif parameter.dim() == 2 and key == "weight" and name.rpartition(".")[2] in ROUTER_NAMES:
                    selection.keep[name] = "router of experts"
    if strict and not selection.convert:
        raise ValueError(
            f"{type(model).__name__} has no module to binarize: "
            + (_summary(selection.keep) if selection.keep else "it has no linear layer.")
        )
    return selection


def _check_rank(name: str, module: nn.Module, choices: ARBConfig) -> None:
    """Factors that take more bits than a budget of bits may be: their fit would end for want of memory, if at all."""
    if not choices.factorized or choices.rank is None:
        return
    rows, columns = linear_shape(module)
    bits = stored_bits(rows, columns, choices.rank, choices.resolved_scale_bits) / (rows * columns)
    if bits > MAX_FACTOR_BITS:
        raise ValueError(
            f"{name}: rank={choices.rank} would take {bits:,.1f} bits a weight of [{rows}, {columns}], and at most "
            f"{MAX_FACTOR_BITS} are of use. Give a smaller rank, or factor_bits."
        )


def resolved_skips(selection: Selection) -> list[str]:
    """Suffixes that match every linear that stays in float and none that is binarized, as short as can be.

    They are what a saved configuration lists: the same modules are found again when the model is loaded as another
    class, whose names lack the prefix of this one.
    """
    suffixes: list[str] = []
    for name in selection.keep:
        if any(matches(suffix, name) for suffix in suffixes):
            continue
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            suffix = ".".join(parts[start:])
            if not any(matches(suffix, other) for other in [*selection.convert, *selection.modules()]):
                suffixes.append(suffix)
                break
    return suffixes


def _check_patterns(config: ARBConfig, names: list[str]) -> None:
    for where, patterns in (
        ("modules_to_not_convert", config.modules_to_not_convert or ()),
        ("overrides", config.overrides),
    ):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                endings = ", ".join(sorted({name.rpartition(".")[2] for name in names})[:30]) or "none at all"
                raise ValueError(
                    f"{where}: the pattern {pattern!r} matches none of the model's linear modules. Give a suffix "
                    f"of their names at a dot, or 're:' and a regular expression of the whole name. "
                    f"They end in: {endings}."
                )


def _user_reason(config: ARBConfig, choices: ARBConfig | None, *names: str) -> str | None:
    for pattern in config.modules_to_not_convert or ():
        if any(matches(pattern, name) for name in names):
            return f"modules_to_not_convert: {pattern!r}"
    return None if choices is not None else "overrides: skip"


def _structural_reasons(
    model: PreTrainedModel, linears: dict[str, nn.Module], others: Container[str]
) -> dict[str, str]:
    """Why a linear stays in float whatever the user chose; the first reason found counts."""
    output = model.get_output_embeddings()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tied |= set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    float32 = _kept_in_float32(model)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    merged = merged_weights(model)
    reasons = {}
    for name, module in linears.items():
        parent, _, last = name.rpartition(".")
        owner: type = type(model.get_submodule(parent))
        if module is output:
            reasons[name] = "output embedding"
        elif f"{name}.weight" in tied:
            reasons[name] = "weight tied to another module"
        elif uses[id(module)] > 1:
            reasons[name] = "module shared by several parents"
        elif not name.startswith(prefix):
            reasons[name] = "task head"
        elif any(part in ROUTER_NAMES for part in name.split(".")) or "Router" in owner.__name__:
            reasons[name] = "router of experts"
        elif name in others:
            reasons[name] = OTHER_MODALITY
        elif any(pattern.search(name) for pattern in float32):
            reasons[name] = "kept in float32 by transformers"
        elif reads_weight(owner, last) and not _bloom_without_slices(model):
            reasons[name] = f"{owner.__name__} reads its weight directly"
        elif reader := _distant_reader(model, name):
            reasons[name] = f"{reader} reads its weight directly"
        elif f"{name}.weight" in merged:
            reasons[name] = "its weight is stored in pieces"
    return reasons


def _structural_reasons_of_experts(
    model: PreTrainedModel, experts: dict[str, ExpertMatrix], others: Container[str]
) -> dict[str, str]:
    """The same of the matrices of experts."""
    if not experts:
        return {}
    reasons = {
        name: f"transformers converts its checkpoint by {operation}: not supported"
        for name, operation in unsupported_conversions(model, experts).items()
    }
    float32 = _kept_in_float32(model)
    for name in experts:
        if any(pattern.search(name) for pattern in float32):
            reasons[name] = "kept in float32 by transformers"
        elif name in others:
            reasons[name] = OTHER_MODALITY
    return reasons


def _kept_in_float32(model: PreTrainedModel) -> list[re.Pattern]:
    """What matches the names that transformers keeps in float32."""
    parts = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return [re.compile(rf"(^|\.){part}($|\.)") for part in parts]


def merged_weights(model: PreTrainedModel) -> set[str]:
    """Weights of the model that transformers builds out of several tensors of a checkpoint, or splits one into."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    conversions = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    reverse = [r for r in (c.reverse_transform() for c in conversions) if isinstance(r, WeightConverter)]
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if rename_source_key(name, [], reverse, reverse=True)[1]}


def _bloom_without_slices(model: PreTrainedModel) -> bool:
    """Bloom reads weights directly only to imitate tensor parallel training."""
    return model.config.model_type == "bloom" and getattr(model.config, "pretraining_tp", 1) <= 1


@cache
def reads_weight(parent: type, child: str) -> bool:
    """Whether the code of a module class reads `self.<child>.weight` itself, which packed bits would break."""
    for cls in parent.__mro__:
        if cls is nn.Module:
            break
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            continue
        if re.search(rf"\bself\.{re.escape(child)}\.weight\b", source):
            return True
    return False


def _distant_reader(model: PreTrainedModel, name: str) -> str | None:
    """The class further up whose code reads the weight of a linear through its parent, or None: for instance
    `self.blocks[0].mlp.fc2.weight.dtype`, which would be that of packed bits."""
    parts = name.split(".")
    for end in range(len(parts) - 2, -1, -1):
        owner: type = type(model.get_submodule(".".join(parts[:end])))
        if (parts[-2], parts[-1]) in _distant_reads(owner):
            return owner.__name__
    return None


@cache
def _distant_reads(owner: type) -> frozenset[tuple[str, str]]:
    """(parent, child) of every `<something>.parent.child.weight` in the code of a module class. Initialization does not
    count: transformers leaves packed layers alone there."""
    found: set[tuple[str, str]] = set()
    for cls in owner.__mro__:
        if cls in (nn.Module, PreTrainedModel):
            break
        for key, member in vars(cls).items():
            if key == "_init_weights":
                continue
            code: Any = member.fget if isinstance(member, property) else member
            try:
                source = inspect.getsource(code)
            except (OSError, TypeError):  # no function
                continue
            found.update(re.findall(r"[\w\])]\.(\w+)\.(\w+)\.weight\b", source))
    return frozenset(found)


def _summary(keep: dict[str, str]) -> str:
    return "; ".join(f"{count} kept: {reason}" for reason, count in Counter(keep.values()).items()) + "."


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, each shared tensor once: what a saved model holds."""
    seen: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    persistent = set(model.state_dict(keep_vars=True))
    seen |= {id(b): b for name, b in model.named_buffers() if name in persistent}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
