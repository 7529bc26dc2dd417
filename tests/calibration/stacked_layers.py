"""A model of layers of any kind, and no more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Stack(nn.Module):
    """`[batch, tokens]` to the hidden states `[batch, tokens, 8]` behind `count` layers, each made by `layer`."""

    def __init__(self, layer: Callable[[], nn.Module], count: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(layer() for _ in range(count))
        self.config = type("Config", (), {"is_encoder_decoder": False})()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden
