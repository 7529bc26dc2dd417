"""Binarized layers of one input, for the tests of what they share."""

import torch
from packed_weights import random_binarized
from torch import nn

from optimum_arb.format.layout import all_layouts
from optimum_arb.nn import ARBLinear
from optimum_arb.nn.shared_input import SharedInput

LAYOUTS = {layout.name: layout for layout in all_layouts()}
ROWS = (42, 7, 16)


def layers(name="planes-2-col", rows=ROWS, columns=300, bias=False, **choices) -> list[ARBLinear]:
    found = []
    for seed, count in enumerate(rows):
        weight = random_binarized(LAYOUTS[name], count, columns, seed=seed, **choices)
        found.append(ARBLinear.from_binarized(weight, torch.randn(count) if bias else None))
    return found


def shared(found: list[ARBLinear]) -> SharedInput:
    result = SharedInput(found)
    for index, layer in enumerate(found):
        layer.share(result, index)
    return result


class Attention(nn.Module):
    """Three layers that go through the object as they do on a GPU."""

    def __init__(self, found: list[ARBLinear]):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = found

    def ask(self, layer: ARBLinear, x: torch.Tensor) -> torch.Tensor:
        together = None if torch.compiler.is_compiling() else layer.shared_input
        if together is not None and together.enabled:
            out = together.output(layer, x)
            if out is not None:
                return out
        return layer(x)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        q, k, v = self.ask(self.q_proj, x), self.ask(self.k_proj, memory), self.ask(self.v_proj, memory)
        return torch.cat([q * 2, k, v.tanh()], -1)
