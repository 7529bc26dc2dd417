"""What the input of a packed layer goes through before it meets the sign planes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops.hadamard import transform


class InputTransform(NamedTuple):
    """A block Hadamard transform with signs and a column order, see `optimum_arb.ops.hadamard`.

    Attributes:
        permutation: `[1, K]`, or None.
        sign: int8 `[K]`.
        block: columns of a block.
        backend: the layer's.
    """

    permutation: torch.Tensor | None
    sign: torch.Tensor
    block: int
    backend: str

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` of any floating dtype to the same."""
        plain = type(x) is torch.Tensor and not x.is_meta and not torch.compiler.is_compiling()
        if plain and not (torch.is_grad_enabled() and x.requires_grad):
            return transform(x, self.permutation, self.sign, self.block, backend=self.backend)
        return torch.ops.optimum_arb.hadamard(x, self.permutation, self.sign, self.block, False, self.backend)

    def equals(self, other: InputTransform | None) -> bool:
        """Whether the other one does the same to every input; False where that cannot be looked at."""
        if other is None or (self.block, self.backend) != (other.block, other.backend):
            return False
        if (self.permutation is None) != (other.permutation is None):
            return False
        pairs = [(self.sign, other.sign)]
        if self.permutation is not None and other.permutation is not None:
            pairs.append((self.permutation, other.permutation))
        return all(a.device == b.device and not a.is_meta and torch.equal(a, b) for a, b in pairs)
