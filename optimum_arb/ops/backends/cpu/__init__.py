"""The CPU backend: packed bits straight to sums for a few rows of x, block-wise dequantized weights for many.

Two sets of kernels, native (native.c) and plain torch (lookup.py), each with `linear`, which sums signed columns
without ever forming the weight, and `dequantize`, which forms a chunk of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear as linear_of

from ....format.packing import tile_width
from .. import reference
from ..packed import PackedWeight
from . import lookup, native, operands
from .plan import (
    LOOKUP_ROWS,
    LOOKUP_TERMS,
    Tiles,
    choose_kernel,
    plan_for,
    prepare_columns,
    row_chunks,
    tiles_for,
)
from .salient import salient_weight

# Values of a dequantized chunk of the weight: 8 MiB of float32, which stay in the cache until they are multiplied.
CHUNK_FLOATS = 2**21


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + bias`, accumulated in float32 and rounded to x's dtype once; float64 x takes the reference backend.

    The columns of x enter the native kernels as block fixed point of 24 bits (float32) or 16 (half precision); the
    dequantized weight of long bfloat16 inputs is rounded to bfloat16 where the processor multiplies that faster.

    Args:
        x: `[..., K]`, floating, on the CPU.
        packed: the weight.
        bias: `[N]`, or None.

    Returns:
        `[..., N]`, of x's dtype.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not packed.in_features:
        return reference.linear(x, packed, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, packed.in_features)
    if native.load() is not None:
        kernel = choose_kernel(native.kernels(), packed.layout.name, rows.shape[0], x.dtype)
        if kernel is not None:
            return native.linear(rows, packed, bias, kernel).view(*x.shape[:-1], packed.out_features)
        if rows.dtype == torch.bfloat16 and "avx512-bf16" in native.kernels():
            return _multiplied(rows, packed, bias).view(*x.shape[:-1], packed.out_features)
        direct = False
    else:
        terms = len(plan_for(packed.layout.name).terms)
        direct = rows.shape[0] <= max(LOOKUP_ROWS, LOOKUP_TERMS // terms)
    if packed.permutation is not None:
        rows = _permuted(rows, packed.permutation[0])
    if direct:
        out = _looked_up(rows.float(), packed)
        out = out if bias is None else out + bias
    else:
        out = _dequantized(rows, packed, bias)
    return out.to(x.dtype).view(*x.shape[:-1], packed.out_features)


def plan(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> native.LinearPlan | None:
    """`linear` for inputs like x, made ready; None where the kernels that take the packed bits are not the ones.

    Of 45 microseconds of one token at 576 x 576, 12 less.

    Args:
        x, packed, bias: as in `linear`.
    """
    if native.load() is None or x.dtype not in operands.TYPES or not x.numel() or not packed.out_features:
        return None
    if operands.ready(packed) is not packed or operands.ready_tensor(bias) is not bias:
        return None
    rows = x.numel() // packed.in_features
    kernel = choose_kernel(native.kernels(), packed.layout.name, rows, x.dtype)
    if kernel is None:
        return None
    return native.LinearPlan(rows, x.dtype, packed, bias, kernel)


def input_grad(grad: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """`grad W`, `[..., K]` from `[..., N]`, with the weight dequantized chunk by chunk; dtypes as in `linear`."""
    if grad.dtype == torch.float64 or not packed.in_features:
        return reference.input_grad(grad, packed)
    rows = grad.reshape(-1, packed.out_features).float()
    tiles = _tiles(packed)
    total = rows.new_zeros(rows.shape[0], tiles.count * 8 * tiles.lanes)
    salient_total = None
    for start, stop, weight, salient in _chunks(packed):
        part = rows[:, start:stop]
        total.addmm_(part, weight)
        if salient is not None:
            if salient_total is None:
                salient_total = rows.new_zeros(rows.shape[0], salient.shape[1])
            salient_total.addmm_(part, salient)  # in place, as above: autocast would round a product to half precision
    out = _leave_kernel_order(total, tiles)
    if salient_total is not None:
        out = out.index_add(1, _salient_index(packed), salient_total)
    if packed.permutation is not None:
        out = torch.empty_like(out).index_copy_(1, packed.permutation[0].long(), out)
    return out.to(grad.dtype).view(*grad.shape[:-1], packed.in_features)


def _looked_up(rows: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """float32 `[M, N]` from the packed bits in plain torch."""
    plan, tiles = plan_for(packed.layout.name), _tiles(packed)
    columns = prepare_columns(rows, packed, plan, tiles)
    out = rows.new_empty(rows.shape[0], packed.out_features)
    for start, stop in row_chunks(packed.out_features, packed.in_features, CHUNK_FLOATS):
        out[:, start:stop] = lookup.linear(columns, packed.rows(start, stop), plan, tiles)
    if plan.salient_terms:
        at = rows.index_select(1, _salient_index(packed))
        for start, stop in row_chunks(packed.out_features, at.shape[1], CHUNK_FLOATS):
            out[:, start:stop] += at @ salient_weight(packed.rows(start, stop), plan.salient_terms).T
    return out


def _multiplied(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """bfloat16 `[M, N]` with the weight dequantized inside of the product; rows are not permuted yet."""
    plan = plan_for(packed.layout.name)
    columns = prepare_columns(_ones(packed), packed, plan, _tiles(packed))
    if not plan.salient_terms:
        return native.gemm(rows, packed, columns, bias)
    out = native.gemm(rows, packed, columns, None)
    at = rows.index_select(1, _salient_source(packed)).float()
    for start, stop in row_chunks(packed.out_features, at.shape[1], CHUNK_FLOATS):
        part = out[:, start:stop] + at @ salient_weight(packed.rows(start, stop), plan.salient_terms).T
        out[:, start:stop] = part if bias is None else part + bias[start:stop]
    return out


def _dequantized(rows: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """float32 `[M, N]` from chunks of the dequantized weight."""
    rows = rows.float()
    x = _enter_kernel_order(rows, _tiles(packed))
    bias = None if bias is None else bias.float()
    out = rows.new_empty(rows.shape[0], packed.out_features)
    at = None
    for start, stop, weight, salient in _chunks(packed):
        if salient is None:
            out[:, start:stop] = linear_of(x, weight, None if bias is None else bias[start:stop])
            continue
        at = rows.index_select(1, _salient_index(packed)) if at is None else at
        part = linear_of(x, weight) + at @ salient.T
        out[:, start:stop] = part if bias is None else part + bias[start:stop]
    return out


def _permuted(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    if rows.element_size() == 2:  # 0.21 ms for 0.65 of 64 x 4096; at four bytes it is the other way round
        return rows.gather(1, order.long().expand(rows.shape))
    return rows.index_select(1, order.int())


def _chunks(packed: PackedWeight) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor | None]]:
    """Rows `start` to `stop` of the weight in kernel order, float32, and what the salient columns have beside it.

    Each weight may be written over by the next: one buffer for all, since fresh pages cost as much as filling them.
    """
    plan, tiles = plan_for(packed.layout.name), _tiles(packed)
    columns = prepare_columns(_ones(packed), packed, plan, tiles)
    width, buffer = tiles.count * 8 * tiles.lanes, None
    for start, stop in row_chunks(packed.out_features, width, CHUNK_FLOATS):
        part = packed.rows(start, stop)
        salient = salient_weight(part, plan.salient_terms) if plan.salient_terms else None
        if native.load() is None:
            weight = lookup.dequantize(columns, part, plan, tiles)
        else:
            buffer = columns.new_empty(stop - start, width) if buffer is None else buffer
            weight = native.dequantize(columns, part, tiles, buffer[: stop - start])
        yield start, stop, weight, salient


def _ones(packed: PackedWeight) -> torch.Tensor:
    """A row of x that leaves the weight as it is, of the kernels' dtype and device, whatever torch's defaults are."""
    return torch.ones(1, packed.in_features, dtype=torch.float32, device="cpu")


def _tiles(packed: PackedWeight) -> Tiles:
    width = tile_width(packed.block_size)
    return tiles_for(packed.in_features, packed.block_size, width // 8 if native.load() is None else native.LANES)


def _salient_index(packed: PackedWeight) -> torch.Tensor:
    assert packed.salient_columns is not None
    return packed.salient_columns[0].long()


def _salient_source(packed: PackedWeight) -> torch.Tensor:
    """The same columns before the permutation."""
    index = _salient_index(packed)
    return index if packed.permutation is None else packed.permutation[0].long()[index]


def _enter_kernel_order(x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """`[M, K]` to `[M, tiles * 8 * lanes]`, the order of the columns in which `dequantize` writes."""
    x = tiles.split(x)
    return (x.transpose(-1, -2) if native.load() is None else x).flatten(1)


def _leave_kernel_order(x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """The inverse of `_enter_kernel_order`."""
    if native.load() is None:
        return tiles.join(x.view(-1, tiles.count, tiles.lanes, 8).transpose(-1, -2))
    return tiles.join(x.view(-1, tiles.count, 8, tiles.lanes))
