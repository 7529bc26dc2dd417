"""Three packed linears of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from optimum_arb.nn import ARBLinear


class Attention(nn.Module):
    """Puts out what its linears do, side by side; they have the names by which `share_inputs` finds them."""

    def __init__(self, layers: Sequence[ARBLinear]):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
