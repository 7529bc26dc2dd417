"""How a layout runs on the CPU: which columns are prepared, and which terms the kernels sum."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch

from ....format.layout import Term, Zone, layout_from_name
from ....format.packing import tile_width
from ..packed import PackedWeight

# Without the native kernels: terms times rows of x up to which signs are looked up, and the rows for which they always
# are. At 4096x4096 on one core a look-up takes 4 ms a term and row, dequantizing and multiplying 40 ms a term.
LOOKUP_TERMS = 8
LOOKUP_ROWS = 2
# Terms times rows of x up to which digits are summed where nothing was timed (ARM, plain C); above, the weight is
# dequantized.
DIRECT_TERMS = 12
# Milliseconds at 4096x4096 on one core of an EPYC with AVX-512 and no matrix unit (Zen 4), by the instructions of the
# kernels: a row and term of two digits and of three, where rows of the weight meet several of x at once (`_is_plain`)
# and where they do not; to dequantize and multiply in float32, whatever the rows and terms, a term, and a row. All
# scale with the size of the weight.
DIRECT_COSTS = {
    "avx512": {True: (0.23, 0.31), False: (0.41, 0.55)},
    "avx2": {True: (0.36, 0.50), False: (0.43, 0.56)},
}
DEQUANTIZED_COSTS = {"avx512": (5.0, 0.9, 0.34), "avx2": (9.0, 1.6, 0.34)}
BFLOAT16_COSTS = (1.6, 0.85, 0.15)  # the same in bfloat16, where the processor multiplies it; 16 rows at once
# The same on one core of a Xeon with AMX: the matrix unit on digits, a row and sign matrix; dequantizing and
# multiplying, whatever the rows, a term and a row.
AMX_COSTS = {
    torch.float32: (0.115, 16.0, 0.0, 0.25),
    torch.float16: (0.075, 14.0, 0.0, 0.26),
    torch.bfloat16: (0.070, 1.0, 1.4, 0.033),
}


def choose_kernel(kernels: Collection[str], name: str, rows: int, dtype: torch.dtype) -> str | None:
    """The native kernel for this many rows of x, or None to dequantize the weight and multiply.

    Args:
        kernels: those of this machine, from the slowest to the fastest.
        name: the layout's.
        rows: of x.
        dtype: float32, float16 or bfloat16.
    """
    terms = [term for term in full_plan_for(name).terms if term.planes]
    direct = [kernel for kernel in kernels if kernel != "amx"][-1]
    if rows <= 1:
        return direct  # at two planes 1.34 ms, and 1.57 on the matrix unit
    if "amx" not in kernels:
        return direct if _is_direct_faster(kernels, name, rows, dtype) else None
    digits, fixed, dequantized, multiplied = AMX_COSTS[dtype]
    matrices = len({term.planes for term in terms})
    return "amx" if matrices * rows * digits <= fixed + len(terms) * dequantized + rows * multiplied else None


def _is_direct_faster(kernels: Collection[str], name: str, rows: int, dtype: torch.dtype) -> bool:
    """Whether summing digits is faster than to dequantize the weight, on a processor without a matrix unit."""
    terms = sum(term.planes > 0 for term in full_plan_for(name).terms)
    for family, costs in DIRECT_COSTS.items():
        if any(kernel.startswith(family) for kernel in kernels):
            (fixed, a_term, a_row), dense_rows = DEQUANTIZED_COSTS[family], rows
            if dtype == torch.bfloat16 and "avx512-bf16" in kernels:
                fixed, a_term, a_row = BFLOAT16_COSTS
                dense_rows = -(-rows // 16) * 16
            digits = costs[_is_plain(name)][dtype == torch.float32]
            return rows * terms * digits <= fixed + terms * a_term + dense_rows * a_row
    return rows * terms <= DIRECT_TERMS


@cache
def _is_plain(name: str) -> bool:
    """Whether each sign matrix is a plane of all columns and has one term; such rows meet several of x at once."""
    planes = [term.planes for term in full_plan_for(name).terms if term.planes]
    of_all = {1 << plane for plane in range(layout_from_name(name).planes)}
    return len(set(planes)) == len(planes) and of_all.issuperset(planes)


@dataclass(frozen=True)
class PlanTerm:
    """A term as the kernels see it.

    Attributes:
        planes: bit p set where plane p is a factor; the kernels take the xor of the planes' bits.
        row: index of the row scale.
        variant: index into `Plan.variants`.
        factor: the term's factor, negated where the product of the planes' signs is the complement of that xor.
    """

    planes: int
    row: int
    variant: int
    factor: float


@dataclass(frozen=True)
class Plan:
    """The terms of a layout sorted by how they run.

    Attributes:
        variants: column scale (or None for 1) and zone: what the columns are multiplied with.
        terms: the terms on planes of all columns, with their variant.
        salient_terms: the terms on planes or column scales that the salient columns alone have.
    """

    variants: tuple[tuple[int | None, Zone], ...]
    terms: tuple[PlanTerm, ...]
    salient_terms: tuple[Term, ...]


@cache
def plan_for(name: str) -> Plan:
    """The plan of the layout of this name, with the salient columns' own planes and scales apart."""
    layout = layout_from_name(name)

    def own(term: Term) -> bool:
        return any(p >= layout.planes for p in term.planes) or (term.col is not None and term.col >= layout.col_scales)

    terms = [term for term in layout.terms if not own(term)]
    return Plan(*_with_variants(terms), tuple(term for term in layout.terms if own(term)))


@cache
def full_plan_for(name: str) -> Plan:
    """The plan of the layout of this name with every term among `terms`, sorted by their planes.

    The salient columns' own planes follow those of all columns, their own column scales those of all columns.
    """
    variants, terms = _with_variants(layout_from_name(name).terms)
    return Plan(variants, tuple(sorted(terms, key=lambda term: term.planes)), ())


def _with_variants(
    terms: Iterable[Term],
) -> tuple[tuple[tuple[int | None, Zone], ...], tuple[PlanTerm, ...]]:
    variants: dict[tuple[int | None, Zone], int] = {}
    found = []
    for term in terms:
        variant = variants.setdefault((term.col, term.zone), len(variants))
        # with 1 for +1, the product of an even number of signs is the complement of the xor of their bits
        sign = -1.0 if term.planes and len(term.planes) % 2 == 0 else 1.0
        found.append(PlanTerm(sum(1 << p for p in term.planes), term.row, variant, sign * term.factor))
    return tuple(variants), tuple(found)


@dataclass(frozen=True)
class Tiles:
    """Where the columns of a weight lie in its packing tiles.

    Attributes:
        columns: K.
        block_size: as in `BinarizedWeight`.
        lanes: columns that one bit of a tile is padded to: at least its bytes.
    """

    columns: int
    block_size: int
    lanes: int

    @cached_property
    def width(self) -> int:
        return tile_width(self.block_size)

    @cached_property
    def count(self) -> int:
        return math.ceil(self.columns / self.width)

    @cached_property
    def last_bytes(self) -> int:
        """Bytes of a plane of the last tile."""
        return math.ceil((self.columns - (self.count - 1) * self.width) / 8)

    @cached_property
    def per_block(self) -> int:
        return self.count if self.block_size == -1 else self.block_size // self.width

    @cached_property
    def blocks(self) -> int:
        return math.ceil(self.count / self.per_block)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., tiles, 8, lanes]`: bit j of byte i at `[j, i]`, 0 where the tile has no such column."""
        whole = self.columns // self.width
        start = whole * self.width
        parts = []
        if whole:
            part = x[..., :start].reshape(*x.shape[:-1], whole, 8, self.width // 8)
            parts.append(_pad(part, self.lanes))
        if start < self.columns:
            part = _pad(x[..., start:], self.last_bytes * 8)
            parts.append(_pad(part.reshape(*x.shape[:-1], 1, 8, self.last_bytes), self.lanes))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -3)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        whole = self.columns // self.width
        start = whole * self.width
        parts = []
        if whole:
            parts.append(x[..., :whole, :, : self.width // 8].flatten(-3))
        if start < self.columns:
            parts.append(x[..., whole:, :, : self.last_bytes].flatten(-3)[..., : self.columns - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _pad(x: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


@lru_cache(maxsize=1024)
def tiles_for(columns: int, block_size: int, lanes: int) -> Tiles:
    return Tiles(columns, block_size, lanes)


def prepare_columns(x: torch.Tensor, packed: PackedWeight, plan: Plan, tiles: Tiles) -> torch.Tensor:
    """Columns as the kernels read them: `[M, variants, tiles, 8, lanes]` float32, contiguous.

    Args:
        x: float32 `[M, K]`, in the packed order of the columns.
        packed: the weight, for its column scales and salient columns.
        plan: the variants.
        tiles: the geometry.
    """
    zones = _zones(packed) if any(zone != "all" for _, zone in plan.variants) else {}
    variants = []
    for col, zone in plan.variants:
        value = x
        if col is not None:
            assert packed.col_scale is not None
            value = value * packed.col_scale[col].float()
        if zone != "all":
            value = value.masked_fill(zones[zone], 0.0)
        variants.append(value)
    return tiles.split(variants[0].unsqueeze(1) if len(variants) == 1 else torch.stack(variants, 1)).contiguous()


def _zones(packed: PackedWeight) -> dict[str, torch.Tensor]:
    """For each zone the columns outside of it, bool `[K]`."""
    assert packed.salient_columns is not None
    salient = torch.zeros(packed.in_features, dtype=torch.bool, device=packed.weight.device)
    salient[packed.salient_columns[0].long()] = True
    return {"rest": salient, "salient": ~salient}


def row_chunks(rows: int, columns: int, floats: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose dequantized weight holds at most `floats` values (one row at least)."""
    step = max(1, floats // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
