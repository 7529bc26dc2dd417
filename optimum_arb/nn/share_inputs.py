"""`share_inputs`: finds the layers of a model that are given the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .linear import ARBLinear
from .shared_input import SharedInput, one_transform

if TYPE_CHECKING:
    from .product import PackedProduct

# Children of one module that its forward calls with one and the same tensor, in the order in which they are computed.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def share_inputs(model: nn.Module) -> int:
    """Finds the layers that share an input by their names and types, so that they are computed together.

    Args:
        model: whose packed layers are in place.

    Returns:
        The number of groups.
    """
    groups = 0
    for parent in model.modules():
        for names in SHARED_INPUTS:
            layers = [parent._modules.get(name) for name in names]
            if not all(isinstance(layer, ARBLinear) for layer in layers):
                continue
            found: list[PackedProduct] = [layer.first_product for layer in layers]  # type: ignore[union-attr, misc]
            kinds = {
                (
                    layer.layout.name,
                    layer.block_size,
                    layer.columns,
                    layer.backend,
                    layer.bias is None,
                    layer.operand("permutation") is None,
                )
                for layer in found
            }
            if len(kinds) == 1 and one_transform(found):
                shared = SharedInput(found)
                for index, layer in enumerate(found):
                    layer.share(shared, index)
                groups += 1
    return groups
