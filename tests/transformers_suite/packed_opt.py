"""What the checks of transformers' own suite share."""

from __future__ import annotations

from tiny_models import tokens

from optimum_arb import ARBLinear

IDS = tokens(2, 8, seed=1)


def packed_layers(model) -> dict[str, ARBLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ARBLinear)}
