"""The float experts of transformers: one module whose parameters hold one matrix for each expert.

`@use_experts_implementation` (transformers/integrations/moe.py) marks such modules: `gate_up_proj` (`up_proj` without a
gate) and `down_proj` of shape `[E, N, K]`, or `[E, K, N]` where `is_transposed`, with optional biases `[E, N]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")


@dataclass(frozen=True)
class ExpertMatrix:
    """One kind of matrix of an experts module: the same for each expert.

    Attributes:
        name: of the parameter: "gate_up_proj", "up_proj" or "down_proj".
        experts: E.
        out_features: N, of gate and up together where they are one matrix.
        in_features: K.
        parts: 2 where the upper half of the rows is the gate and the lower half the up projection; each is binarized as
            a matrix of its own, as checkpoints store it. 1 otherwise (gpt-oss interleaves their rows).
        transposed: whether the parameter is `[E, K, N]`.
    """

    name: str
    experts: int
    out_features: int
    in_features: int
    parts: int
    transposed: bool

    @property
    def part_features(self) -> int:
        """Rows of a part."""
        return self.out_features // self.parts

    @property
    def weights(self) -> int:
        """Number of weights of all experts."""
        return self.experts * self.out_features * self.in_features


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer in a form that can be binarized."""
    if not all(hasattr(module, mark) for mark in _MARKS) or not hasattr(type(module), "_apply_gate"):
        return False
    names = {key for key, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    return names == {first_matrix(module), "down_proj"}


def first_matrix(module: nn.Module) -> str:
    """The name of the matrix that the hidden states enter."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def expert_matrices(module: nn.Module) -> dict[str, ExpertMatrix]:
    """The matrices of a float experts module by their names, in the order in which they run."""
    transposed = bool(module.is_transposed)
    found = {}
    for name in (first_matrix(module), "down_proj"):
        parameter = module._parameters[name]
        assert parameter is not None
        experts, rows, columns = parameter.shape
        if transposed:
            rows, columns = columns, rows
        halves = name == "gate_up_proj" and bool(module.is_concatenated) and rows % 2 == 0
        found[name] = ExpertMatrix(name, experts, rows, columns, 2 if halves else 1, transposed)
    return found


def expert_weight(weights: torch.Tensor, matrix: ExpertMatrix, expert: int) -> torch.Tensor:
    """The weight `[N, K]` of one expert out of the parameter, a view."""
    return weights[expert].T if matrix.transposed else weights[expert]
