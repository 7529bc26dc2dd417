"""Packed weights in the order in which the decode kernel reads them: whole rows of memory, one 16-byte load a lane.

On disk and in the module the weight stays as `optimum_arb.format.packing` describes it; this copy lives on the GPU
beside it. It was measured to be worth its memory (one more bit a weight and plane): reading the stored order instead
takes 1.3 to 2.5 times as long at one token on an H200 (28672 x 8192, one plane: 32.5 against 17.6 us with the same
kernel).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from ....format.layout import Layout
from ....format.packing import TENSOR_NAMES, block_count, pack_bits, packed_bytes, tile_width, unpack_bits
from ...streams import finish
from ..grouped import PackedExperts
from ..packed import PackedWeight

ROWS = 32  # rows of a warp's tile
SLOTS = 128  # columns of a tile
ONE_BIT_TOKENS = 4  # of `one_bit`


@dataclass(frozen=True)
class Program:
    """What the kernel does with a tile, from the layout alone; constants of the compiled kernel.

    Attributes:
        planes: sign planes of the prepacked words.
        row_scales: row scales of a (row, block).
        inputs: the scaled inputs `(column scale or -1, zone)` that the terms are products with.
        terms: `(planes as a bit mask, row scale, index into inputs, factor)`; mask 0 is a mean.
    """

    planes: int
    row_scales: int
    inputs: tuple[tuple[int, str], ...]
    terms: tuple[tuple[int, int, int, float], ...]


def program(layout: Layout) -> Program:
    """The program of a layout; planes of the salient columns alone come after the others, widened to all columns."""
    inputs: list[tuple[int, str]] = []
    terms = []
    for term in layout.terms:
        source = (-1 if term.col is None else term.col, term.zone)
        if source not in inputs:
            inputs.append(source)
        terms.append((sum(1 << plane for plane in term.planes), term.row, inputs.index(source), term.factor))
    return Program(layout.planes + layout.salient_planes, layout.row_scales, tuple(inputs), tuple(terms))


@dataclass(frozen=True)
class Prepacked:
    """A weight `[N, K]` for the decode kernel. G = ceil(N / 32) groups of rows, T tiles.

    Attributes:
        program: see `Program`.
        rows: N.
        tiles_per_block: tiles that share a row scale.
        words: int32 `[G, T, planes, 8 (g), 4 (t), 4 (j)]`: word t of row `32 G + 8 j + g`.
        row_scale: `[G, blocks, row_scales, 8 (g), 4 (j)]`.
        input_scale: float32 `[inputs, T * 128]`: the factors of the inputs, 0 where a column is not in the zone or does
            not exist.
        index: int32 `[T * 128]`: the columns of the input; None where they are 0, 1, 2, ...
        experts: E where these are the weights of experts, all tensors then stacked along a new first dimension; else 0.
        half: tuned number of tokens -> `HalfConfig`, up to which `half_bits` is the fastest; by `few_tokens.prepare`.
        plans: kept by `few_tokens`, `one_bit` and `half_bits`.
    """

    program: Program
    rows: int
    tiles_per_block: int
    words: torch.Tensor
    row_scale: torch.Tensor
    input_scale: torch.Tensor
    index: torch.Tensor | None
    experts: int = 0
    half: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # launches that were made ready

    @property
    def tiles(self) -> int:
        return self.words.shape[-5]

    @property
    def groups(self) -> int:
        return self.words.shape[-6]

    @property
    def most_tokens(self) -> int:
        """Up to which number of tokens the kernels that read this copy are the fastest."""
        return max(self.half, default=ONE_BIT_TOKENS)


def prepack(packed: PackedWeight) -> Prepacked:
    """The prepacked copy of a weight, on its device."""
    layout, columns, rows = packed.layout, packed.in_features, packed.out_features
    steps = program(layout)
    tile = tile_width(packed.block_size)
    words = _tile_bytes(packed.weight, layout.planes, columns, tile)
    if layout.salient_planes:
        words = torch.cat(
            [words, _tile_bytes(_widened_salient_planes(packed), layout.salient_planes, columns, tile)], 2
        )
    blocks = block_count(columns, packed.block_size)
    scale = packed.row_scale.view(rows, blocks, layout.row_scales)
    left = -rows % ROWS
    if left:
        words = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, 0, 0, left))
        scale = torch.nn.functional.pad(scale, (0, 0, 0, 0, 0, left))
    tiles = words.shape[1]
    words = words.contiguous().view(torch.int32).view(-1, 4, 8, tiles, steps.planes, 4).permute(0, 3, 4, 2, 5, 1)
    scale = scale.view(-1, 4, 8, blocks, layout.row_scales).permute(0, 3, 4, 2, 1)
    column = _slot_columns(columns, tile, packed.weight.device)
    exists = column >= 0
    column = column.clamp(min=0)
    found = column if packed.permutation is None else packed.permutation[0].long()[column]
    index: torch.Tensor | None = torch.where(exists, found, 0).int()
    assert index is not None
    if torch.equal(index, torch.arange(len(index), dtype=torch.int32, device=index.device)) and bool(exists.all()):
        index = None
    return Prepacked(
        steps,
        rows,
        tiles if packed.block_size == -1 else max(packed.block_size // SLOTS, 1),
        words.contiguous(),
        scale.contiguous(),
        torch.stack([_input_scale(packed, source, column) * exists for source in steps.inputs]).contiguous(),
        index,
    )


def _tile_bytes(weight: torch.Tensor, planes: int, columns: int, tile: int) -> torch.Tensor:
    """uint8 `[N, bytes]` to `[N, T, planes, 16]`: every tile as wide as a whole one of 128 columns."""
    whole, left = divmod(columns, tile)
    per_plane = tile // 8
    cut = whole * planes * per_plane
    pieces = []
    if whole:
        pieces.append(weight[:, :cut].reshape(weight.shape[0], whole, planes, per_plane))
    if left:
        pieces.append(weight[:, cut:].reshape(weight.shape[0], 1, planes, packed_bytes(left, tile)))
    return torch.cat([torch.nn.functional.pad(piece, (0, SLOTS // 8 - piece.shape[3])) for piece in pieces], 1)


def _widened_salient_planes(packed: PackedWeight) -> torch.Tensor:
    assert packed.salient_weight is not None
    assert packed.salient_columns is not None
    planes, tile = packed.layout.salient_planes, tile_width(packed.block_size)
    signs = unpack_bits(packed.salient_weight, planes, packed.salient_columns.shape[1], tile)
    wide = signs.new_zeros(planes, packed.out_features, packed.in_features)
    wide[:, :, packed.salient_columns[0].long()] = signs
    return pack_bits(wide, tile)


def _slot_columns(columns: int, tile: int, device: torch.device) -> torch.Tensor:
    """int64 `[T * 128]`: the stored column of slot `16 g + 4 t + j` of each tile, -1 where there is none."""
    slot = torch.arange(SLOTS, device=device)
    bit, byte = slot // 16, slot % 16
    found = []
    for start in range(0, columns, tile):
        width = min(tile, columns - start)
        count = -(-width // 8)
        column = bit * count + byte
        found.append(torch.where((byte < count) & (column < width), start + column, -1))
    return torch.cat(found)


def _input_scale(packed: PackedWeight, source: tuple[int, str], column: torch.Tensor) -> torch.Tensor:
    """float32 `[T * 128]`: the column scale times 1 in the zone and 0 outside."""
    col, zone = source
    scale = torch.ones(packed.in_features, device=column.device)
    salient = None if packed.salient_columns is None else packed.salient_columns[0].long()
    if col >= packed.layout.col_scales:
        assert packed.salient_col_scale is not None
        assert salient is not None
        scale = torch.zeros_like(scale)
        scale[salient] = packed.salient_col_scale[col - packed.layout.col_scales].float()
    elif col >= 0:
        assert packed.col_scale is not None
        scale = packed.col_scale[col].float()
    if zone != "all" and salient is not None:
        within = torch.zeros(packed.in_features, dtype=torch.bool, device=column.device)
        within[salient] = True
        scale = torch.where(within if zone == "salient" else ~within, scale, 0)
    return scale[column]


def join(parts: list[Prepacked]) -> Prepacked | None:
    """Several weights of one input as one: the rows one after another. None where they do not fit together.

    The result has `input_scale` `[parts * inputs, T * 128]` and `index` `[parts, T * 128]` (or None); each part begins
    at a whole group of rows.
    """
    first = parts[0]
    for part in parts[1:]:
        same = (
            part.program,
            part.tiles,
            part.tiles_per_block,
            part.row_scale.dtype,
            part.words.device,
            part.index is None,
        )
        if same != (
            first.program,
            first.tiles,
            first.tiles_per_block,
            first.row_scale.dtype,
            first.words.device,
            first.index is None,
        ):
            return None
    indices = [part.index for part in parts if part.index is not None]
    return Prepacked(
        first.program,
        sum(part.rows for part in parts),
        first.tiles_per_block,
        torch.cat([part.words for part in parts]),
        torch.cat([part.row_scale for part in parts]),
        torch.cat([part.input_scale for part in parts]),
        torch.stack(indices) if indices else None,
    )


def experts(packed: PackedExperts) -> Prepacked | None:
    """The prepacked weights of all experts; the parts of each are joined. None where they do not fit together."""
    found = []
    for expert in range(packed.weight.shape[0]):
        parts = [prepack(packed.matrix(expert, part)) for part in range(packed.parts)]
        joined = parts[0] if len(parts) == 1 else join(parts)
        if joined is None:
            return None
        found.append(joined)
    indices = [weight.index for weight in found if weight.index is not None]
    if len(indices) not in (0, len(found)):
        return None  # some are in natural order, some are not
    return replace(
        found[0],
        words=torch.stack([weight.words for weight in found]),
        row_scale=torch.stack([weight.row_scale for weight in found]),
        input_scale=torch.stack([weight.input_scale for weight in found]),
        index=torch.stack(indices) if indices else None,
        experts=len(found),
        half={},
        plans={},
    )


Weights: TypeAlias = "list[PackedWeight] | PackedExperts"

# Prepacked copies by the addresses of the weights that they were made of. An entry goes when any memory that it was
# made of goes: addresses are used again, by the next model of the same shapes for one.
_cache: dict[tuple[int, ...], tuple[tuple[int, ...], Prepacked | None]] = {}


def find(weights: Weights) -> Prepacked | None:
    """The copy that `make` made of these tensors, if they have not changed since."""
    found = _cache.get(_key(weights))
    return None if found is None or found[0] != _state(weights) else found[1]


def make(weights: Weights) -> Prepacked | None:
    """The prepacked copy of one weight, of several of one input or of experts, made at the first call and kept.

    Args:
        weights: on one CUDA device.

    Returns:
        The copy; None where the weights do not fit together.
    """
    key, state = _key(weights), _state(weights)
    found = _cache.get(key)
    if found is None or found[0] != state:
        with torch.no_grad():
            if isinstance(weights, PackedExperts):
                made = experts(weights)
            else:
                parts = [prepack(packed) for packed in weights]
                made = parts[0] if len(parts) == 1 else join(parts)
        finish(_members(weights)[0].weight.device)
        found = _cache[key] = (state, made)
        for tensor in _tensors(weights):
            # the storage, not the tensor: `module.to` gives the same parameter another one
            weakref.finalize(tensor.untyped_storage(), _forget, key, state)
    return found[1]


def forget() -> None:
    """Drops all copies."""
    _cache.clear()


def _members(weights: Weights) -> Sequence[PackedWeight | PackedExperts]:
    return [weights] if isinstance(weights, PackedExperts) else weights


def drop(weights: Weights) -> None:
    """Drops the copy of these weights, if there is one."""
    _cache.pop(_key(weights), None)


def _forget(key: tuple[int, ...], state: tuple[int, ...]) -> None:
    """Drops an entry, unless it was made again since."""
    found = _cache.get(key)
    if found is not None and found[0] is state:
        del _cache[key]


def _tensors(weights: Weights) -> list[torch.Tensor]:
    found = [getattr(packed, name) for packed in _members(weights) for name in TENSOR_NAMES]
    return [tensor for tensor in found if tensor is not None]


def _key(weights: Weights) -> tuple[int, ...]:
    return tuple(packed.weight.data_ptr() for packed in _members(weights))


def _state(weights: Weights) -> tuple[int, ...]:
    """Changes when a tensor is replaced or written."""
    found = []
    for tensor in _tensors(weights):
        found += [tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version]
    return tuple(found)
