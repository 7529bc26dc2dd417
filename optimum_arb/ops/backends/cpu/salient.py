"""The terms that only the salient columns have, where those have planes or column scales of their own."""

from __future__ import annotations

import math

import torch

from ....format.layout import Term
from ....format.packing import unpack_bits
from ..packed import PackedWeight
from .plan import tiles_for


def salient_weight(packed: PackedWeight, salient_terms: tuple[Term, ...]) -> torch.Tensor:
    """What `salient_terms` add to the weight's salient columns: float32 `[N, S]`.

    Args:
        packed: the weight, or a chunk of its rows.
        salient_terms: terms of the zone "salient", from the weight's `Plan`.
    """
    layout = packed.layout
    assert packed.salient_columns is not None
    tiles = tiles_for(packed.in_features, packed.block_size, 16)
    at = packed.salient_columns[0].long()
    tile, column = at // tiles.width, at % tiles.width
    whole = tiles.width // 8
    nbytes = torch.where(tile + 1 < tiles.count, whole, tiles.last_bytes)
    byte, bit = column % nbytes, (column // nbytes).to(torch.uint8)
    own = None
    if packed.salient_weight is not None:
        own = unpack_bits(packed.salient_weight, layout.salient_planes, len(at), tiles.width)
    row_scale = packed.row_scale.view(-1, tiles.blocks, layout.row_scales)
    single: dict[int, torch.Tensor] = {}
    products: dict[tuple[int, ...], torch.Tensor] = {}

    def sign_of(plane: int) -> torch.Tensor:
        if plane not in single:
            if plane >= layout.planes:
                assert own is not None
                bits = own[plane - layout.planes]
            else:
                where = tile * layout.planes * whole + plane * nbytes + byte
                bits = (packed.weight.index_select(1, where) >> bit) & 1
            single[plane] = bits.float().mul_(2).sub_(1)
        return single[plane]

    # not by itself: a function that refers to itself is a cycle, and held the weight's tensors after every call
    def sign(planes: tuple[int, ...]) -> torch.Tensor:
        """The product of the planes, float32 `[N, S]`; multiplying by it is several times faster than selecting."""
        if planes not in products:
            products[planes] = math.prod(map(sign_of, planes[1:]), start=sign_of(planes[0]))
        return products[planes]

    total = torch.zeros(packed.out_features, len(at), dtype=torch.float32, device=at.device)
    for term in salient_terms:
        scale = (row_scale[..., term.row].float() * term.factor).index_select(1, tile // tiles.per_block)
        if term.col is not None:
            own_scale = term.col >= layout.col_scales
            scales = packed.salient_col_scale if own_scale else packed.col_scale
            assert scales is not None
            col = scales[term.col - layout.col_scales] if own_scale else scales[term.col].index_select(0, at)
            scale *= col.float()
        if term.planes:
            total.addcmul_(scale, sign(term.planes))
        else:
            total += scale
    return total
