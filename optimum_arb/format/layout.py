"""What the planes of a binarized weight mean: a sum of scaled products of sign planes.

Every method of the field, with or without bitmaps, ends in

    W[n, k] = sum over terms t of  factor_t * row_scale[n, block(k), row_t] * col_scale[col_t, k] * sign_t[n, k]

where `sign_t` is the product of some of the stored sign planes. A product of no plane is +1: that term is a mean. A
group bitmap `g` is never stored as such: the plane `s2 = s * (-1)^g` is, because then a weight whose row scale depends
on its group, r0 or r1, is `(r0 + r1)/2 * s + (r0 - r1)/2 * s2`, and means per group are a term on `s * s2`.

A `Layout` is that list of terms. It follows from the configuration, has a short name, and is all that an operator
needs besides the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Zone = Literal["all", "rest", "salient"]
GROUP_BITMAPS = ("none", "non-salient", "all")
MAX_PLANES = 3


@dataclass(frozen=True)
class Term:
    """One scaled sign matrix.

    Attributes:
        planes: the sign planes whose product is this term's sign; `()` is the constant +1. Indices below
            `Layout.planes` are planes of all columns, the others planes of the salient columns alone.
        row: index of the row scale `[n, block]`.
        col: index of the column scale `[k]`, or None for 1. Indices below `Layout.col_scales` are of all columns,
            the others of the salient columns alone.
        zone: the columns on which the term counts: "all", "salient", or "rest" (all but the salient ones).
        factor: a constant of the layout.
    """

    planes: tuple[int, ...]
    row: int
    col: int | None = None
    zone: Zone = "all"
    factor: float = 1.0


@dataclass(frozen=True)
class Layout:
    """The terms of a weight and how many tensors of each kind they use.

    Attributes:
        name: the canonical name, which `layout_from_name` turns back into this object.
        planes: sign planes stored for every column (1 bit a weight each).
        salient_planes: sign planes stored for the salient columns alone.
        row_scales: values stored per row and block.
        col_scales: values stored per column.
        salient_col_scales: values stored per salient column, beside `col_scales`.
        salient: whether a list of salient columns is stored.
        terms: see `Term`.
    """

    name: str
    planes: int
    salient_planes: int
    row_scales: int
    col_scales: int
    salient_col_scales: int
    salient: bool
    terms: tuple[Term, ...]

    @property
    def is_planes(self) -> bool:
        """Whether each term is one sign plane of all columns, so that no scale needs to be negative."""
        return not self.salient and [term.planes for term in self.terms] == [(i,) for i in range(self.planes)]


@cache
def planes_layout(planes: int, mean: bool = False, col_scale: bool = False) -> Layout:
    """`planes` sign planes over all columns, each with a row scale, and, if asked, a column scale or a shared mean.

    Round-to-nearest and ARB without bitmaps (`col_scale=False`), ARB-RC without bitmaps and arb-hrc (`col_scale=True`).
    """
    if not 1 <= planes <= MAX_PLANES:
        raise ValueError(f"planes={planes} cannot be packed: 1 to {MAX_PLANES} are supported.")
    terms = [Term((p,), row=p, col=p if col_scale else None) for p in range(planes)]
    if mean:
        terms.append(Term((), row=planes))
    name = f"planes-{planes}" + ("-mean" if mean else "") + ("-col" if col_scale else "")
    return Layout(name, planes, 0, planes + mean, planes if col_scale else 0, 0, False, tuple(terms))


def _group_terms(zone: Zone, row: int, plane: int, col_scale: bool, mean: bool, cols: tuple[int, int]) -> list[Term]:
    """One sign whose scale (and mean) depends on the group bit held in planes (0, 1).

    `plane` is the sign plane: 0, or the second-order plane, whose group variant is its product with planes 0 and 1.
    Without column scales the row scales are stored as half sum and half difference of the groups' scales; with column
    scales, which differ from group to group too, as the two groups' own.
    """
    other = (1,) if plane == 0 else (0, 1, plane)
    if not col_scale:
        terms = [Term((plane,), row, zone=zone), Term(other, row + 1, zone=zone)]
        if mean:
            terms += [Term((), row + 2, zone=zone), Term((0, 1), row + 3, zone=zone)]
        return terms
    return [
        Term(planes, row + group, cols[group], zone, factor)
        for group in (0, 1)
        for planes, factor in (((plane,), 0.5), (other, 0.5 if group == 0 else -0.5))
    ]


@cache
def bitmap_layout(group_bitmap: str, salient: bool, col_scale: bool) -> Layout:
    """BiLLM and ARB with bitmaps: salient columns at order 2, the rest at order 1, groups of weights by magnitude.

    Args:
        group_bitmap: "none", "non-salient" (BiLLM: the rest is split into two groups) or "all" (the paper's
            column-group bitmap: the salient columns are split too).
        salient: whether salient columns exist.
        col_scale: True for ARB-RC (column scales, no mean), False for BiLLM, ARB and ARB-X (means, no column scales).

    Row scales in their order (s: salient; half sums and half differences over the groups where there are two):
        BiLLM, ARB, ARB-X "non-salient": a+, a-, mean+, mean-, a1_s, a2_s, mean_s              (7 a row and block)
        "all":                           a+, a-, mean+, mean-, a1_s+-, mean_s+-, a2_s+-        (10)
        ARB-RC "non-salient":            r_0, r_1, r1_s, r2_s                                  (4)
        "all":                           r_0, r_1, r1_s0, r1_s1, r2_s0, r2_s1                  (6)
    where group 0 is the one of large weights.
    """
    if group_bitmap not in GROUP_BITMAPS:
        raise ValueError(f"group_bitmap={group_bitmap!r} is unknown: use one of {GROUP_BITMAPS}.")
    if group_bitmap == "none" and not salient:
        return planes_layout(1, mean=not col_scale, col_scale=col_scale)
    if not salient:
        group_bitmap = "non-salient"
    rest: Zone = "rest" if salient else "all"
    mean = not col_scale
    if group_bitmap == "none":
        terms = [Term((0,), 0, 0 if col_scale else None, rest)]
        if mean:
            terms.append(Term((), 1, zone=rest))
    else:
        terms = _group_terms(rest, 0, 0, col_scale, mean, cols=(0, 1))
    planes = 1 if group_bitmap == "none" else 2
    col_scales = planes if col_scale else 0
    salient_planes = salient_cols = 0
    if salient:
        row = max(t.row for t in terms) + 1
        if group_bitmap == "all":
            salient_planes, salient_cols = 1, 2 if col_scale else 0
            terms += _group_terms("salient", row, 0, col_scale, mean, cols=(0, 1))
            row = max(t.row for t in terms) + 1
            terms += _group_terms("salient", row, 2, col_scale, False, cols=(2, 3))
        else:
            # BiLLM keeps no group bit on the salient columns: their second sign takes its place in plane 1
            salient_planes = 0 if planes == 2 else 1
            salient_cols = salient_planes if col_scale else 0
            terms += [Term((p,), row + p, p if col_scale else None, "salient") for p in (0, 1)]
            if mean:
                terms.append(Term((), row + 2, zone="salient"))
    name = f"groups-{group_bitmap}" + ("-salient" if salient else "") + ("-col" if col_scale else "-mean")
    row_scales = max(t.row for t in terms) + 1
    return Layout(name, planes, salient_planes, row_scales, col_scales, salient_cols, salient, tuple(terms))


@cache
def layout_from_name(name: str) -> Layout:
    """The layout that carries this name.

    Raises:
        ValueError: no layout has this name.
    """
    for layout in all_layouts():
        if layout.name == name:
            return layout
    raise ValueError(f"Unknown layout {name!r}: this version knows {sorted(layout.name for layout in all_layouts())}.")


@cache
def all_layouts() -> tuple[Layout, ...]:
    """Every layout that this version can store and run."""
    extras: tuple[dict[str, bool], ...] = ({}, {"mean": True}, {"col_scale": True})
    found = [planes_layout(p, **extra) for p in range(1, MAX_PLANES + 1) for extra in extras]
    found += [bitmap_layout(g, s, c) for g in GROUP_BITMAPS for s in (False, True) for c in (False, True)]
    return tuple({layout.name: layout for layout in found}.values())


def form_name(name: str, hadamard: int = 0) -> str:
    """What reports call a form of weights: the layout's name, and the block of a Hadamard transform of the inputs."""
    return f"{name}-hadamard-{hadamard}" if hadamard else name
