"""The kernels in plain torch, for machines without the native extension: tables of the 256 values of a byte."""

from __future__ import annotations

from functools import lru_cache, reduce

import torch

from ..packed import PackedWeight
from .plan import Plan, PlanTerm, Tiles


@lru_cache(maxsize=1)
def _byte_signs() -> torch.Tensor:
    """int8 `[256, 8]`: the signs of the bits of each byte."""
    return ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1) * 2 - 1).to(torch.int8)


def _tile_bytes(packed: PackedWeight, tiles: Tiles) -> torch.Tensor:
    """The planes as uint8 `[N, tiles, planes, bytes of a whole tile]`, the last tile padded."""
    planes, nbytes = packed.layout.planes, tiles.width // 8
    whole = packed.in_features // tiles.width
    split = whole * planes * nbytes
    parts = []
    if whole:
        parts.append(packed.weight[:, :split].reshape(-1, whole, planes, nbytes))
    if whole < tiles.count:
        last = packed.weight[:, split:].reshape(-1, 1, planes, tiles.last_bytes)
        parts.append(torch.nn.functional.pad(last, (0, nbytes - tiles.last_bytes)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _product(planes: torch.Tensor, term: PlanTerm) -> torch.Tensor:
    """The xor of the planes of a term, `[N, tiles, bytes]`."""
    factors = [planes[:, :, plane] for plane in range(planes.shape[2]) if term.planes >> plane & 1]
    return reduce(torch.bitwise_xor, factors)


def _tile_scales(packed: PackedWeight, tiles: Tiles, term: PlanTerm) -> torch.Tensor:
    """The term's row scale, factor included, for every tile: float32 `[N, tiles]`."""
    scales = packed.row_scale.view(-1, tiles.blocks, packed.layout.row_scales)[..., term.row].float() * term.factor
    return scales if tiles.per_block == 1 else scales.repeat_interleave(tiles.per_block, 1)[:, : tiles.count]


def linear(columns: torch.Tensor, packed: PackedWeight, plan: Plan, tiles: Tiles) -> torch.Tensor:
    """Sums the plan's terms for every row of x: one table look-up per 8 weights.

    Args:
        columns: float32 `[M, variants, tiles, 8, bytes]` from `prepare_columns`.
        packed: the weight.
        plan: its plan.
        tiles: its geometry, with as many lanes as a whole tile has bytes.

    Returns:
        float32 `[M, N]`.
    """
    # for every byte of a row the sum of its 8 columns under each of the 256 combinations of signs
    tables = (columns.transpose(-1, -2) @ _byte_signs().T.float()).flatten(2)
    offsets = torch.arange(tiles.count * tiles.lanes, dtype=torch.int32, device=columns.device)
    offsets = offsets.view(tiles.count, tiles.lanes) * 256
    planes = _tile_bytes(packed, tiles)
    out = columns.new_zeros(columns.shape[0], packed.out_features)
    for term in plan.terms:
        scales = _tile_scales(packed, tiles, term)
        if not term.planes:
            out += columns[:, term.variant].sum((2, 3)) @ scales.T
            continue
        index = _product(planes, term).int().add_(offsets).view(-1)
        for row, table in zip(out, tables[:, term.variant], strict=True):
            sums = table.index_select(0, index).view(-1, tiles.count, tiles.lanes)
            row += torch.bmm(scales.unsqueeze(1), sums).sum((1, 2))
    return out


def dequantize(columns: torch.Tensor, packed: PackedWeight, plan: Plan, tiles: Tiles) -> torch.Tensor:
    """The plan's terms as a weight, float32 `[N, tiles * 8 * bytes]` in the order of `Tiles.split` transposed.

    That is bit j of byte i at `[i, j]` of a tile: the order in which the signs leave the table. `columns` are those of
    a row of ones.
    """
    planes = _tile_bytes(packed, tiles)
    # the eight signs of a byte as one int64: one look-up moves them all
    table = _byte_signs().view(torch.int64).view(-1)
    total = columns.new_zeros(packed.out_features, tiles.count, tiles.lanes, 8)
    for term in plan.terms:
        scales = _tile_scales(packed, tiles, term)[..., None, None]
        column = columns[0, term.variant].transpose(-1, -2)
        if not term.planes:
            total += scales * column
            continue
        signs = table.index_select(0, _product(planes, term).int().view(-1)).view(torch.int8).view(total.shape)
        total += signs.float().mul_(scales).mul_(column)
    return total.flatten(1)
