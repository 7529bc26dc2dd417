"""Residual binarization, the common start of BiLLM and ARB, over groups of a zone of columns.

A *zone* is a set of columns of a block; its weights are split into one or two *groups*, each fitted by itself:

    Q[n, k] = mean[n, g] + sum_o scale[n, g, o] * col_scale[g, o, k] * sign[o, n, k],      g = group of (n, k)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ZoneFit:
    """The parameters of a zone of `[N, k]` weights in G groups at order O.

    Attributes:
        signs: bool `[O, N, k]`, True = +1.
        scale: float `[N, G, O]`.
        mean: float `[N, G]`, or None (ARB-RC has none).
        col_scale: float `[G, O, k]`, or None (all but ARB-RC).
        groups: float `[G, N, k]`, 1 where a weight belongs to the group; the groups partition the zone.
    """

    signs: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor | None
    col_scale: torch.Tensor | None
    groups: torch.Tensor

    def reconstruction(self) -> torch.Tensor:
        """Q, float `[N, k]`."""
        total = torch.zeros_like(self.groups[0])
        for g, mask in enumerate(self.groups):
            total += mask * self.group_reconstruction(g)
        return total

    def group_reconstruction(self, g: int) -> torch.Tensor:
        """What group g's parameters give on the whole zone, float `[N, k]`."""
        value = torch.zeros_like(self.groups[0])
        for o, bits in enumerate(self.signs):
            level = self.scale[:, g, o, None]
            if self.col_scale is not None:
                level = level * self.col_scale[g, o]
            value += torch.where(bits, level, -level)
        return value if self.mean is None else value + self.mean[:, g, None]


def nearest_signs(target: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
    """The signs whose sum of `levels` is nearest to `target`, element by element: ARB's update of B.

    Args:
        target: float `[...]`.
        levels: one or two scales of any sign, each broadcastable to `target`.

    Returns:
        bool `[O, ...]`. A tie, and a level of zero, give +1.
    """
    if len(levels) == 1:
        return ((target >= 0) == (levels[0] >= 0))[None]
    first, second = (level.expand_as(target) for level in levels)
    swap = second.abs() > first.abs()
    large, small = torch.where(swap, second, first), torch.where(swap, first, second)
    # of +-large +-small with |large| >= |small|, the larger takes the sign of the target, the smaller the rest's
    large_sign = (target >= 0) == (large >= 0)
    rest = target - torch.where(large_sign, large, -large)
    small_sign = (rest >= 0) == (small >= 0)
    return torch.stack([torch.where(swap, small_sign, large_sign), torch.where(swap, large_sign, small_sign)])


def residual_binarization(weight: torch.Tensor, groups: torch.Tensor, order: int) -> ZoneFit:
    """Order times: `mean = mean(R), scale = mean|R - mean|, R <- R - mean - scale sign(R - mean)` (BiLLM, arXiv
    2402.04291, Sec. 3.2, residual approximation), per row and group.

    Args:
        weight: float `[N, k]`.
        groups: float `[G, N, k]`, see `ZoneFit`.
        order: 1 or 2.
    """
    count = groups.sum(2).clamp(min=1)  # [G, N]; an empty group keeps mean and scale 0
    residual = weight
    mean = torch.zeros_like(count)
    scales, signs = [], []
    for _ in range(order):
        step_mean = (groups * residual).sum(2) / count
        centred = residual - (groups * step_mean[:, :, None]).sum(0)
        scale = (groups * centred.abs()).sum(2) / count
        bits = centred >= 0
        level = (groups * scale[:, :, None]).sum(0)
        residual = centred - torch.where(bits, level, -level)
        mean += step_mean
        scales.append(scale.T)
        signs.append(bits)
    return ZoneFit(torch.stack(signs), torch.stack(scales, 2), mean.T, None, groups)
