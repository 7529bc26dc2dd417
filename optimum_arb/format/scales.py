"""How scales are stored: in float16 or float32, or in 8 bits: positive numbers on a logarithmic grid, and zero.

    value(0) = 0,    value(code) = 2^(low + step * (code - 1))  for code 1 to 255,  rounded to float16

A logarithmic grid gives every scale the same relative error, whatever its size, at most 2^(step / 2) - 1: 0.4 % where
the scales span three octaves, as those of a trained layer do, 1.5 % at the widest. Zero has a code of its own, which no
logarithm reaches: rows and columns of zeros are exact. `low` and `step` are float32, one pair for each kind of scale
and plane.

The grid ends at the largest scale and begins at the smallest, or, where the squared error is less so, at the largest
times a power of two from 1/2 to 2^-11; scales below it become its first value or zero, whichever is nearer. Both ends
are rounded to float16 first, and a value of a grid is nearest to itself, so that scales which have been rounded to a
grid come out as they are when they are rounded to it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .layout import Layout

SCALE_BITS = (16, 8)
CODES = 255
# Octaves that a grid spans at most. Below 2^-11 of the largest scale, rounding vanishes beside what the others lose.
MAX_OCTAVES = 11


def encode_scales(
    scale: torch.Tensor, known: torch.Tensor | None = None, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The codes of scales, and their grid.

    Args:
        scale: float, of any shape, none negative.
        known: float32 `[2]`, a grid to take where no other has a lower error, as for scales that are on it.
        importance: float, of the shape of `scale`, what the squared error of each counts; 1 unless given.

    Returns:
        uint8 of the same shape, and float32 `[2]`: `low` and `step`. None where float16 does not hold a grid for these
        scales: they overflow, or are so small that its values would be subnormal.
    """
    values = scale.detach().to(torch.float64)
    positive = values[values > 0]
    if not positive.numel():
        return torch.zeros_like(values, dtype=torch.uint8), torch.zeros(2, device=scale.device)
    largest, smallest = _float16(float(positive.max())), _float16(float(positive.min()))
    info = torch.finfo(torch.float16)
    starts = [largest * 2.0**-octaves for octaves in range(1, MAX_OCTAVES + 1)]
    if smallest >= largest * 2.0**-MAX_OCTAVES:
        starts.insert(0, smallest)
    starts = [start for start in starts if start >= info.tiny]
    if not starts or largest > info.max:
        return None
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least = math.inf
    ends = [(math.log2(start), (math.log2(largest) - math.log2(start)) / (CODES - 1)) for start in starts]
    grids = [torch.tensor(each, dtype=torch.float32, device=scale.device) for each in ends]
    for grid in ([] if known is None else [known.to(scale.device)]) + grids:
        codes = _nearest(values, grid)
        error = (decode_scales(codes, grid).double() - values).square()
        lost = float((error if importance is None else error * importance).sum())
        if lost < least:
            best, least = (codes, grid), lost
    return best


def decode_scales(codes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The scales of codes, computed in float64 and rounded once.

    Args:
        codes: uint8 `[..., G]`, or `[...]` of one grid.
        grid: float32 `[G, 2]`, or `[2]`.

    Returns:
        float16 of the shape of `codes`.
    """
    low, step = grid[..., 0].double(), grid[..., 1].double()
    value = torch.exp2(low + step * (codes.double() - 1))
    return torch.where(codes > 0, value, 0.0).to(torch.float16)


def nearest_on_grid(scale: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The nearest values on grids to scales, whose signs stay.

    Args:
        scale: float `[..., G]`.
        grid: float32 `[G, 2]`.

    Returns:
        of the shape and dtype of `scale`.
    """
    codes = _nearest(scale.abs().double(), grid)
    return torch.copysign(decode_scales(codes, grid).to(scale.dtype), scale)


class Rounding:
    """`nearest_on_grid` for grids that stay, by a search in tables: a training step of a small linear would otherwise
    spend half of its operators on it.

    Args:
        grid: float32 `[G, 2]`.
    """

    def __init__(self, grid: torch.Tensor):
        codes = torch.arange(CODES + 1, device=grid.device)
        self._values = decode_scales(codes[:, None].expand(-1, len(grid)), grid).T.float()  # [G, 256]
        low, step = grid[:, :1].double(), grid[:, 1:].double()
        between = torch.exp2(low + step * (codes[1:-1] - 0.5)).float()
        # a value is nearest to itself, see `_nearest`; as it is where two codes stand for the same
        here, above = self._values[:, 1:-1], self._values[:, 2:]
        least = torch.nextafter(here, torch.full_like(here, math.inf))
        between = torch.where(here < above, torch.maximum(torch.minimum(between, above), least), between)
        # below half of the first value, zero is nearer
        self._bounds = torch.cat([torch.exp2(low - 1).float(), between], 1)

    def __call__(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest values to scales `[..., G]`, float32, whose signs stay."""
        rows = scale.movedim(-1, 0)
        size = rows.abs().reshape(len(self._values), -1).contiguous()
        found = self._values.gather(1, torch.searchsorted(self._bounds, size, right=True))
        return torch.copysign(found.view(rows.shape).movedim(0, -1), scale)


def round_scales(scale: torch.Tensor) -> torch.Tensor:
    """What scales are once they have been stored in 8 bits, for fitting other parameters around them.

    Args:
        scale: float, all of one grid (one kind and plane), none negative.

    Returns:
        The rounded scales in float32; where float16 does not hold a grid for them, as they are.
    """
    encoded = encode_scales(scale)
    return scale.to(torch.float32) if encoded is None else decode_scales(*encoded).to(torch.float32)


def _nearest(values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The codes uint8 `[..., G]` nearest to values float64 `[..., G]`, none negative, on grids `[G, 2]`; or `[...]` of
    one grid `[2]`."""
    low, step = grid[..., 0].double(), grid[..., 1].double()
    first = torch.exp2(low)
    at = (torch.maximum(values, first / 2).log2() - low) / torch.where(step > 0, step, 1.0)
    codes = torch.where(values < first / 2, 0.0, at.round().clamp(0, CODES - 1) + 1).to(torch.uint8)
    # By their logarithms; once rounded, the next code's value may be nearer: in steps of 0.0011 octaves 0.99965 becomes
    # 0.9995, and 1.0004 becomes 1, to which the former is the nearer one. A value of the grid must come out as it is.
    here = decode_scales(codes, grid)
    above, below = (codes + (codes < CODES)).to(torch.uint8), (codes - (codes > 1).to(torch.uint8)).to(torch.uint8)
    up, down = decode_scales(above, grid), decode_scales(below, grid)
    inside = codes > 0
    codes = torch.where(inside & (up > here) & (up <= values), above, codes)
    return torch.where(inside & (down < here) & (down >= values), below, codes)


def _float16(value: float) -> float:
    """The nearest float16, not below the least that is no subnormal; larger ones than it holds as they are."""
    if value > torch.finfo(torch.float16).max:
        return value
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float16)) or value


def store_scale(scale: torch.Tensor, sums: bool = False) -> torch.Tensor:
    """float16, or float32 where a value would overflow or lose its precision as a subnormal (below 6.1e-5).

    Values below 2^-11 of the largest do not count: their rounding vanishes beside the others'.

    Args:
        scale: float, of any shape.
        sums: whether they stand beside others in the levels of a row, as means and half differences do. Those are as
            often near zero as not, and no precision of their own is asked for, while 6e-8, the step of subnormals, is
            small beside the scales of any row that counts: where the largest is 2^-8 or more, 3 % of 2^-11 of it.
            Asked for, weights of a size of 0.02, as those of most 7B, had 3.8 in place of 2.9 bits with BiLLM.
    """
    size = scale.abs()
    largest = float(size.max()) if size.numel() else 0.0
    info = torch.finfo(torch.float16)
    small = size[(size > 0) & (size >= largest * 2**-11)]
    near_zero = sums and largest >= 2**-8
    if largest > info.max or (not near_zero and small.numel() and float(small.min()) < info.tiny):
        return scale.to(torch.float32)
    return scale.to(torch.float16)


def store_coded(
    tensors: Mapping[str, torch.Tensor], grids: Mapping[str, int], known: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scales in 8 bits, and their grids.

    Args:
        tensors: scales by name, two-dimensional, none negative.
        grids: name -> number of grids. Those of "row_scale" take turns along the columns, those of "col_scale" have a
            row each; a single one is the whole tensor's.
        known: float32 `[sum of grids, 2]`, as for `encode_scales`; rows of 0 are none.

    Returns:
        uint8 of the same shapes by name, or, where float16 does not hold a grid for a tensor, its scales as
        `store_scale` makes them; and float32 `[sum of grids, 2]`, rows of 0 for the latter.
    """
    stored: dict[str, torch.Tensor] = {}
    every: list[torch.Tensor] = []
    for name, count in grids.items():
        parts = _by_grid(name, tensors[name], count)
        at = sum(each.shape[0] for each in every)
        rows = torch.zeros(count, 2) if known is None else known[at : at + count]
        of_each = [row if bool(row.any()) else None for row in rows]
        encoded = [encode_scales(parts[..., index], of_each[index]) for index in range(count)]
        if any(one is None for one in encoded):
            stored[name] = store_scale(tensors[name])
            every.append(torch.zeros(count, 2, device=parts.device))
            continue
        codes = torch.stack([one[0] for one in encoded if one is not None], -1)
        stored[name] = _from_grids(name, codes, tensors[name])
        every.append(torch.stack([one[1] for one in encoded if one is not None]))
    return stored, torch.cat(every)


def decode_coded(name: str, tensor: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The float16 scales of a tensor of codes.

    Args:
        name: of the tensor, as in `store_coded`.
        tensor: uint8.
        grid: float32 `[grids of this tensor, 2]`.
    """
    return _from_grids(name, decode_scales(_by_grid(name, tensor, len(grid)), grid), tensor)


def _by_grid(name: str, tensor: torch.Tensor, count: int) -> torch.Tensor:
    """`[A, B, grids]`."""
    if name == "col_scale" and count > 1:
        return tensor.T[:, None]
    return tensor.view(tensor.shape[0], -1, count)


def _from_grids(name: str, parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_by_grid`, in the shape of `like`."""
    return parts[:, 0].T.contiguous() if name == "col_scale" and parts.shape[2] > 1 else parts.reshape(like.shape)


def scale_grids(layout: Layout) -> dict[str, int]:
    """The tensors of scales of plain planes -> how many grids each has in 8 bits, in the order of `scale_grid`."""
    grids = {"row_scale": layout.row_scales, "col_scale": layout.col_scales}
    return {name: count for name, count in grids.items() if count}


def decoded(tensors: Mapping[str, torch.Tensor], grids: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The tensors with float16 scales in the place of codes, without their grids.

    Args:
        tensors: as they are stored.
        grids: name -> number of grids, in the order of `scale_grid`.
    """
    found = {name: tensor for name, tensor in tensors.items() if name != "scale_grid"}
    if "scale_grid" in tensors:
        for (name, _), grid in zip(grids.items(), tensors["scale_grid"].split(list(grids.values())), strict=True):
            if tensors[name].dtype == torch.uint8:
                found[name] = decode_coded(name, tensors[name], grid)
    return found
