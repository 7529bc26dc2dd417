"""`BinarizedWeight`, what every algorithm returns, and its packed form, what is stored, loaded and run.

Bits are packed in tiles of 128 columns (64 where `block_size` is 64), the planes of a tile side by side:

    one row:   | tile 0: plane 0, plane 1, ... | tile 1: plane 0, plane 1, ... | ...          uint8
    one plane of a tile of w columns, b = ceil(w / 8) bytes (16 in a whole tile of 128):
               byte i, bit j  <->  column j * b + i of the tile, 1 = +1, 0 = -1; bits past column w - 1 are 0

so that bit j of the 16 bytes gives 16 neighbouring columns by one shift, and a slice of rows or of whole tiles is a
slice of the tensor. The last tile is as narrow as the columns that are left: nothing is padded but the last byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .hadamard import hadamard_transform
from .layout import Layout
from .scales import SCALE_BITS, decoded, scale_grids, store_coded, store_scale

TILE = 128
FORMAT_VERSION = 2
# The tensors of a packed weight of sign planes, in the order in which they are listed and the operator takes them.
TENSOR_NAMES = (
    "weight",
    "row_scale",
    "col_scale",
    "permutation",
    "salient_columns",
    "salient_weight",
    "salient_col_scale",
)
# Every tensor that a packed module may store: those, the inner factor's of `optimum_arb.format.factors`, the grids of
# scales in 8 bits, and the signs of a Hadamard transform.
STORED_NAMES = (*TENSOR_NAMES, "inner", "inner_row_scale", "inner_col_scale", "scale_grid", "input_signs")


@dataclass
class BinarizedWeight:
    """A binarized weight of shape `[N, K]` (out_features, in_features), unpacked.

    Column j of every tensor here is column `permutation[j]` of the weight (j itself without a permutation).

    Attributes:
        layout: the terms that the tensors enter.
        block_size: columns that share a row scale: 64, a multiple of 128, or -1 for all.
        signs: bool `[planes, N, K]`, True = +1.
        row_scale: float `[N, blocks, row_scales]`.
        col_scale: float `[col_scales, K]`, or None where the layout has none.
        permutation: int64 `[K]`, or None.
        salient_columns: int64 `[S]`, ascending, or None where the layout has no salient columns.
        salient_signs: bool `[salient_planes, N, S]`, or None.
        salient_col_scale: float `[salient_col_scales, S]`, or None.
        hadamard: the block of a Hadamard transform (`optimum_arb.format.hadamard`) that the permuted inputs go through
            before they meet the planes: `y = planes(Hadamard(sign * x[permutation]))`; 0 for none.
        input_signs: the signs of that transform, bool `[K]`, True = +1, in the order of the permuted inputs; None
            without one.
        scale_grid: the grids of 8 bits that the scales were fitted on, as `pack` takes them, or None. Without them it
            finds others where the ends of a grid are not in use, and rounds a second time.
    """

    layout: Layout
    block_size: int
    signs: torch.Tensor
    row_scale: torch.Tensor
    col_scale: torch.Tensor | None = None
    permutation: torch.Tensor | None = None
    salient_columns: torch.Tensor | None = None
    salient_signs: torch.Tensor | None = None
    salient_col_scale: torch.Tensor | None = None
    hadamard: int = 0
    input_signs: torch.Tensor | None = None
    scale_grid: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[1], self.signs.shape[2]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[N, K]` that this stands for, computed in float32 (float64 if asked) and cast to `dtype`."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        rows, columns = self.shape
        width = columns if self.block_size == -1 else self.block_size
        block = torch.arange(columns, device=self.signs.device) // width
        salient = self.salient_columns
        weight = torch.zeros(rows, columns, dtype=compute, device=self.signs.device)
        every = torch.arange(columns, device=self.signs.device)
        zones = {"all": every, "rest": every}
        if salient is not None:
            taken = torch.zeros(columns, dtype=torch.bool, device=self.signs.device).index_fill_(0, salient, True)
            # sorted, not `nonzero`: as many as the shapes say, so that torch 2.6 compiles it and no GPU is waited for
            zones["rest"] = taken.to(torch.uint8).sort(stable=True).indices[: columns - len(salient)]
            zones["salient"] = salient
        for term in self.layout.terms:
            at = zones[term.zone]
            value = term.factor * self.row_scale[:, block[at], term.row].to(compute)
            if term.col is not None:
                value = value * self._column_scale(term.col, at).to(compute)
            for plane in term.planes:
                value = torch.where(self._sign(plane, at), value, -value)
            weight[:, at] += value
        if self.hadamard:
            assert self.input_signs is not None
            weight = hadamard_transform(weight, self.hadamard) * torch.where(self.input_signs, 1.0, -1.0).to(weight)
        if self.permutation is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.permutation, weight)
        return weight.to(dtype)

    def times(self, unit: float) -> BinarizedWeight:
        """`unit` times the weight, a power of two: exact."""
        grid = self.scale_grid
        if grid is not None:
            of_rows = torch.arange(len(grid), device=grid.device)[:, None] < self.layout.row_scales
            moves = of_rows & grid.any(1, keepdim=True)  # grids of 0 are none
            grid = grid + moves * torch.tensor([math.log2(unit), 0.0], device=grid.device)
        return replace(self, row_scale=self.row_scale * unit, scale_grid=grid)

    def with_positive_scales(self) -> BinarizedWeight:
        """The same weight of plain planes (`Layout.is_planes`), the signs of its scales moved into the planes."""
        columns = self.shape[1]
        width = columns if self.block_size == -1 else self.block_size
        block = torch.arange(columns, device=self.signs.device) // width
        signs = self.signs ^ (self.row_scale < 0).permute(2, 0, 1)[:, :, block]
        if self.col_scale is not None:
            signs = signs ^ (self.col_scale < 0)[:, None]
        col_scale = None if self.col_scale is None else self.col_scale.abs()
        return replace(self, signs=signs, row_scale=self.row_scale.abs(), col_scale=col_scale)

    def _sign(self, plane: int, at: torch.Tensor) -> torch.Tensor:
        """Signs of a plane at the columns `at` (the salient columns where the plane is theirs alone)."""
        if plane < self.layout.planes:
            return self.signs[plane][:, at]
        assert self.salient_signs is not None  # the layout says so
        return self.salient_signs[plane - self.layout.planes]

    def _column_scale(self, col: int, at: torch.Tensor) -> torch.Tensor:
        every, salient = self.col_scale, self.salient_col_scale
        if col < self.layout.col_scales:
            assert every is not None  # the layout says so
            return every[col, at]
        assert salient is not None
        return salient[col - self.layout.col_scales]


def check_block_size(block_size: int) -> None:
    """Raises ValueError where blocks of this many columns cannot be packed."""
    if block_size not in (64, -1) and (block_size < TILE or block_size % TILE):
        raise ValueError(
            f"block_size={block_size} cannot be packed: use 64, a multiple of {TILE}, or -1 for whole rows."
        )


def block_count(in_features: int, block_size: int) -> int:
    """Blocks of a row: the last one holds what is left."""
    return 1 if block_size == -1 else math.ceil(in_features / block_size)


def tile_width(block_size: int) -> int:
    """Columns of a packing tile."""
    return 64 if block_size == 64 else TILE


def packed_bytes(columns: int, tile: int) -> int:
    """Bytes of one plane of one row."""
    whole, left = divmod(columns, tile)
    return whole * (tile // 8) + math.ceil(left / 8)


def pack_bits(bits: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Packs sign planes; the picture at the top of this file shows where each bit goes.

    Args:
        bits: bool `[P, N, K]`, True = +1.
        tile: columns of a tile, 64 or 128.

    Returns:
        uint8 `[N, P * packed_bytes(K, tile)]`.
    """
    planes, rows, columns = bits.shape
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    pieces = []
    whole = columns - columns % tile
    for start, stop, width in ((0, whole, tile), (whole, columns, columns - whole)):
        if start == stop:
            continue
        nbytes = math.ceil(width / 8)
        part = bits[:, :, start:stop].to(torch.uint8).view(planes, rows, -1, width)
        part = torch.nn.functional.pad(part, (0, nbytes * 8 - width)).view(planes, rows, -1, 8, nbytes)
        part = (part << shift).sum(3, dtype=torch.uint8)  # [P, N, tiles, bytes]
        pieces.append(part.permute(1, 2, 0, 3).reshape(rows, -1))
    return torch.cat(pieces, 1).contiguous() if pieces else bits.new_zeros(rows, 0, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, planes: int, columns: int, tile: int = TILE) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 `[N, bytes]` to bool `[P, N, K]`."""
    rows = packed.shape[0]
    shift = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    whole = columns - columns % tile
    split = planes * packed_bytes(whole, tile)
    pieces = []
    for part, width, count in ((packed[:, :split], tile, whole // tile), (packed[:, split:], columns - whole, 1)):
        if not count or not width:
            continue
        nbytes = math.ceil(width / 8)
        part = part.reshape(rows, count, planes, 1, nbytes)
        part = ((part >> shift) & 1).to(torch.bool).flatten(3)[..., :width]  # [N, tiles, P, width]
        pieces.append(part.permute(2, 0, 1, 3).reshape(planes, rows, -1))
    return torch.cat(pieces, 2) if pieces else packed.new_zeros(planes, rows, 0, dtype=torch.bool)


def _store_index(index: torch.Tensor, columns: int) -> torch.Tensor:
    return index.to(torch.int16 if columns <= 2**15 else torch.int32)[None]


def pack(
    weight: BinarizedWeight, scale_bits: int = 16, scale_grid: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that are stored, all of two dimensions, by their names in `STORED_NAMES`.

    Args:
        weight: the weight.
        scale_bits: 16, or 8 for plain planes (`Layout.is_planes`): then `row_scale` and `col_scale` are uint8 codes on
            the grids of `scale_grid`, see `optimum_arb.format.scales`.
        scale_grid: grids to take where no others have a lower error, as for scales that are on them; None for those of
            the weight.

    | name | dtype | shape |
    |---|---|---|
    | `weight` | uint8 | `[N, planes * packed_bytes(K)]` |
    | `row_scale` | float16 (float32 where float16 cannot hold it) | `[N, blocks * row_scales]`, row scales innermost |
    | `col_scale` | as above | `[col_scales, K]` |
    | `permutation` | int16 (int32 above 32768 columns) | `[1, K]` |
    | `salient_columns` | as above | `[1, S]`, ascending |
    | `salient_weight` | uint8 | `[N, salient_planes * packed_bytes(S)]` |
    | `salient_col_scale` | as `col_scale` | `[salient_col_scales, S]` |
    | `scale_grid` | float32 | `[row_scales + col_scales, 2]`, with `scale_bits=8` alone |
    | `input_signs` | uint8 | `[1, packed_bytes(K)]` in tiles of 128, with a Hadamard transform alone |

    Raises:
        ValueError: `scale_bits` is neither, or 8 for another layout.
    """
    if scale_bits not in SCALE_BITS or (scale_bits == 8 and not weight.layout.is_planes):
        raise ValueError(f"scale_bits={scale_bits} cannot be packed with the layout {weight.layout.name}.")
    if scale_bits == 8:
        weight = weight.with_positive_scales()
    columns = weight.shape[1]
    tile = tile_width(weight.block_size)
    tensors: dict[str, torch.Tensor] = {
        "weight": pack_bits(weight.signs, tile),
        "row_scale": store_scale(weight.row_scale.flatten(1), sums=not weight.layout.is_planes),
    }
    if weight.col_scale is not None:
        tensors["col_scale"] = store_scale(weight.col_scale)
    if weight.permutation is not None:
        tensors["permutation"] = _store_index(weight.permutation, columns)
    if weight.salient_columns is not None:
        tensors["salient_columns"] = _store_index(weight.salient_columns, columns)
    if weight.salient_signs is not None:
        tensors["salient_weight"] = pack_bits(weight.salient_signs, tile)
    if weight.salient_col_scale is not None:
        tensors["salient_col_scale"] = store_scale(weight.salient_col_scale)
    if weight.hadamard:
        assert weight.input_signs is not None
        tensors["input_signs"] = pack_bits(weight.input_signs[None, None])
    if scale_bits == 8:
        scales = {"row_scale": weight.row_scale.flatten(1)}
        if weight.col_scale is not None:
            scales["col_scale"] = weight.col_scale
        coded, tensors["scale_grid"] = store_coded(
            scales, scale_grids(weight.layout), weight.scale_grid if scale_grid is None else scale_grid
        )
        tensors.update(coded)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack(
    tensors: Mapping[str, torch.Tensor], layout: Layout, in_features: int, block_size: int, hadamard: int = 0
) -> BinarizedWeight:
    """The inverse of `pack`, up to the rounding of the scales.

    Args:
        tensors: as `pack` returns them.
        layout: the layout that they were packed with.
        in_features: K.
        block_size: as in `BinarizedWeight`.
        hadamard: as in `BinarizedWeight`.

    Raises:
        ValueError: there are signs of a Hadamard transform, and no block of it is given, or the other way round.
    """
    if bool(hadamard) != ("input_signs" in tensors):
        raise ValueError(f"A weight with the tensors {', '.join(tensors)} cannot be unpacked with hadamard={hadamard}.")
    tile = tile_width(block_size)
    grid = tensors.get("scale_grid")
    tensors = decoded(tensors, scale_grids(layout))
    rows = tensors["weight"].shape[0]
    blocks = block_count(in_features, block_size)
    salient = tensors.get("salient_columns")
    salient_signs = None
    if salient is not None and layout.salient_planes:
        salient_signs = unpack_bits(tensors["salient_weight"], layout.salient_planes, salient.shape[1], tile)
    permutation = tensors.get("permutation")
    return BinarizedWeight(
        layout=layout,
        block_size=block_size,
        signs=unpack_bits(tensors["weight"], layout.planes, in_features, tile),
        row_scale=tensors["row_scale"].view(rows, blocks, layout.row_scales),
        col_scale=tensors.get("col_scale"),
        permutation=None if permutation is None else permutation[0].long(),
        salient_columns=None if salient is None else salient[0].long(),
        salient_signs=salient_signs,
        salient_col_scale=tensors.get("salient_col_scale"),
        hadamard=hadamard,
        input_signs=unpack_bits(tensors["input_signs"], 1, in_features)[0, 0] if hadamard else None,
        scale_grid=grid,
    )


def packed_shapes(
    layout: Layout,
    out_features: int,
    in_features: int,
    block_size: int,
    permuted: bool,
    salient: int = 0,
    scale_bits: int = 16,
    hadamard: int = 0,
) -> dict[str, tuple[int, int]]:
    """The shape of every stored tensor of a weight, from its description alone (see `pack`).

    Args:
        layout: the layout.
        out_features: N.
        in_features: K.
        block_size: as in `BinarizedWeight`.
        permuted: whether the columns are permuted.
        salient: the number of salient columns.
        scale_bits: as for `pack`.
        hadamard: as in `BinarizedWeight`.
    """
    tile = tile_width(block_size)
    shapes = {
        "weight": (out_features, layout.planes * packed_bytes(in_features, tile)),
        "row_scale": (out_features, block_count(in_features, block_size) * layout.row_scales),
    }
    if layout.col_scales:
        shapes["col_scale"] = (layout.col_scales, in_features)
    if permuted:
        shapes["permutation"] = (1, in_features)
    if layout.salient:
        shapes["salient_columns"] = (1, salient)
    if layout.salient_planes:
        shapes["salient_weight"] = (out_features, layout.salient_planes * packed_bytes(salient, tile))
    if layout.salient_col_scales:
        shapes["salient_col_scale"] = (layout.salient_col_scales, salient)
    if scale_bits == 8:
        shapes["scale_grid"] = (layout.row_scales + layout.col_scales, 2)
    if hadamard:
        shapes["input_signs"] = (1, packed_bytes(in_features, TILE))
    return shapes


def stored_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors, which are the bytes of their data in a safetensors file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def bits_per_weight(tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> float:
    """All stored bits of a packed weight, scales and indices and bitmaps included, over its number of weights."""
    return stored_bytes(tensors) * 8 / (out_features * in_features)
