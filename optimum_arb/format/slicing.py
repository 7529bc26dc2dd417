"""Rows and columns of a packed weight, for tensor parallelism. Nothing here needs vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from .layout import Layout
from .packing import block_count, pack_bits, packed_bytes, tile_width, unpack_bits

# The tensors that have a row for each output; the others are shared by all outputs.
ROW_TENSORS = ("weight", "row_scale", "salient_weight")


def slice_rows(tensors: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Some rows (outputs) of a packed weight, in the order given.

    Args:
        tensors: as `optimum_arb.format.packing.pack` returns them.
        rows: int64 `[n]`.
    """
    return {name: tensor.index_select(0, rows) if name in ROW_TENSORS else tensor for name, tensor in tensors.items()}


def column_obstacle(tensors: Collection[str], in_features: int, block_size: int, parts: int) -> str | None:
    """Why a packed weight cannot be cut into `parts` equal ranges of columns; None where it can.

    Each part must be a weight of the same layout: whole blocks of columns (whole packing tiles where a block is the
    whole row), in the order of the inputs. The answer depends on shapes alone and is the same on every rank.
    """
    if "input_signs" in tensors:
        return "its inputs go through a Hadamard transform, whose blocks are of all columns"
    if "permutation" in tensors:
        return "its columns are stored in order of activation, so that every block holds columns of every part"
    width = tile_width(block_size) if block_size == -1 else block_size
    if in_features % parts or (in_features // parts) % width:
        return f"{in_features} columns in {parts} parts cut through blocks of {width}"
    return None


def slice_columns(
    tensors: Mapping[str, torch.Tensor], layout: Layout, in_features: int, block_size: int, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """The columns (inputs) from `start` to `stop` of a packed weight; both lie between blocks (`column_obstacle`).

    Args:
        tensors: as `optimum_arb.format.packing.pack` returns them, without a permutation.
        layout: the layout that they were packed with.
        in_features: K.
        block_size: as it was packed.
        start: first column.
        stop: the column after the last one.

    Returns:
        The tensors of a packed weight `[N, stop - start]` of the same layout and block size.

    Raises:
        ValueError: the columns are permuted, or the range cuts through a block.
    """
    tile = tile_width(block_size)
    width = tile if block_size == -1 else block_size
    if "permutation" in tensors or start % width or (stop % width and stop != in_features):
        raise ValueError(
            f"Columns {start} to {stop} of a packed weight with {in_features} columns are no slice of it: blocks of "
            f"{width} columns{' in order of activation' if 'permutation' in tensors else ''} cannot be cut."
        )
    first, last = (layout.planes * packed_bytes(column, tile) for column in (start, stop))
    result = dict(tensors)
    result["weight"] = tensors["weight"][:, first:last].contiguous()
    if block_size != -1:
        scales = tensors["row_scale"].unflatten(1, (block_count(in_features, block_size), layout.row_scales))
        blocks = slice(start // block_size, block_count(stop, block_size))
        result["row_scale"] = scales[:, blocks].flatten(1).contiguous()
    if "col_scale" in tensors:
        result["col_scale"] = tensors["col_scale"][:, start:stop].contiguous()
    if "salient_columns" in tensors:
        columns = tensors["salient_columns"]
        inside = (columns[0] >= start) & (columns[0] < stop)
        result["salient_columns"] = columns[:, inside] - start
        if "salient_weight" in tensors:
            signs = unpack_bits(tensors["salient_weight"], layout.salient_planes, columns.shape[1], tile)
            result["salient_weight"] = pack_bits(signs[:, :, inside], tile)
        if "salient_col_scale" in tensors:
            result["salient_col_scale"] = tensors["salient_col_scale"][:, inside].contiguous()
    return result
