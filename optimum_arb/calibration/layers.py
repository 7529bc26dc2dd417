"""The lists of layers of a model, and whether one can be run layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Layers:
    """A list of layers that run one after the other: one `ModuleList` of the model.

    Attributes:
        names: of the layers.
        modules: the layers.
        targets: per layer, the names of the modules in it that are to be binarized.
        seen: per layer, what a short run saw: (hidden states in, output) of each of its calls.
        written_between: whether it saw the hidden states written into between two layers.
        outputs_in_arguments: whether what else a layer is called with comes of what the layers before it put out.
    """

    names: list[str]
    modules: list[nn.Module]
    targets: list[list[str]]
    seen: list[list[tuple[torch.Tensor | None, Any]]] = field(default_factory=list)
    written_between: bool = False
    outputs_in_arguments: bool = False

    def is_chain(self) -> bool:
        """Whether each layer runs once, in order, and hands nothing but its hidden states to the next."""
        previous = None
        if self.written_between or self.outputs_in_arguments:
            return False
        for calls in self.seen:
            if len(calls) != 1:
                return False
            hidden, output = calls[0]
            if hidden is None or (previous is not None and hidden is not previous):
                return False
            if isinstance(output, (tuple, list)):
                if not output or any(part is not None for part in output[1:]):
                    return False
                output = output[0]
            if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
                return False
            previous = output
        return True

    def kinds(self) -> list[int]:
        """For each layer, the first one that is like it: of the same classes and shapes."""
        first: dict[tuple, int] = {}
        return [first.setdefault(_kind(module), index) for index, module in enumerate(self.modules)]


def _kind(layer: nn.Module) -> tuple:
    classes = tuple((name, type(module)) for name, module in layer.named_modules())
    return classes, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def find_layers(model: nn.Module, targets: Iterable[str]) -> list[Layers]:
    """The outermost `ModuleList`s that hold modules to be binarized."""
    targets = list(targets)
    groups: list[Layers] = []
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in found):
            continue
        if any(target.startswith(name + ".") for target in targets):
            found.append(name)
            names = [f"{name}.{index}" for index in range(len(module))]
            groups.append(Layers(names, list(module), [[t for t in targets if t.startswith(n + ".")] for n in names]))
    return groups


def no_one_chain(groups: list[Layers]) -> str | None:
    """Why a model's hidden states cannot be followed from layer to layer, or None if they can."""
    if len(groups) != 1:
        lists = ", ".join(group.names[0].rpartition(".")[0] for group in groups) or "none"
        return f"it needs one list of layers, and these hold linears to binarize: {lists}"
    if not groups[0].is_chain():
        name = groups[0].names[0].rpartition(".")[0]
        return f"the layers of {name} hand on more than their hidden states, or do not run in order"
    return None
