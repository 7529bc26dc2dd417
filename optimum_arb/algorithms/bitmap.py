"""One block of BiLLM, ARB, ARB-X or ARB-RC: its partition and the fit of its zones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .arb import arb
from .arb_rc import arb_rc
from .arb_x import arb_x
from .partition import large_weights, salient_columns
from .residual import ZoneFit, residual_binarization


@dataclass
class BitmapFit:
    """A block of `[N, k]` weights.

    Attributes:
        rest, salient: the fits of the two zones; `salient` is None without salient columns.
        rest_columns, salient_columns: int64, the zones' columns within the block.
    """

    rest: ZoneFit
    salient: ZoneFit | None
    rest_columns: torch.Tensor
    salient_columns: torch.Tensor

    def reconstruction(self) -> torch.Tensor:
        """Q, float `[N, k]`."""
        rest = self.rest.reconstruction()
        total = rest.new_zeros(len(rest), len(self.rest_columns) + len(self.salient_columns))
        total[:, self.rest_columns] = rest
        if self.salient is not None:
            total[:, self.salient_columns] = self.salient.reconstruction()
        return total


def fit_bitmap_block(
    weight: torch.Tensor,
    score: torch.Tensor,
    metric: torch.Tensor,
    method: str,
    group_bitmap: str,
    salient: str | int,
    split_metric: str,
    num_iterations: int,
) -> BitmapFit:
    """Partitions a block and fits its zones: salient columns at order 2, the others at order 1.

    Args:
        weight: float32 `[N, k]`, the compensated weights of the block.
        score: float32 `[N, k]`, `W^2 / diag(U)^2` (BiLLM's salience).
        metric: float32 `[k, k]`, the undamped block of `X^T X` (ARB-X alone uses it).
        method: "billm", "arb", "arb-x" or "arb-rc".
        group_bitmap: "none", "non-salient" or "all" (the column-group bitmap).
        salient: "search", or a number of columns.
        split_metric: "weight" or "score".
        num_iterations: rounds of the refinement.
    """
    columns = torch.arange(weight.shape[1], device=weight.device)
    values = weight if split_metric == "weight" else score
    chosen = columns[:0] if salient == 0 else salient_columns(score, salient)
    is_salient = torch.zeros_like(columns, dtype=torch.bool)
    is_salient[chosen] = True
    rest = columns[~is_salient]

    def fit_zone(zone: torch.Tensor, order: int, magnitude: torch.Tensor | None) -> ZoneFit:
        if magnitude is None:
            groups = torch.ones(1, len(weight), len(zone), dtype=weight.dtype, device=weight.device)
        else:
            large = large_weights(values[:, zone], magnitude, order).to(weight.dtype)
            groups = torch.stack([large, 1 - large])
        target = weight[:, zone]
        if method == "billm":
            return residual_binarization(target, groups, order)
        if method == "arb":
            return arb(target, groups, order, num_iterations)
        if method == "arb-x":
            return arb_x(target, groups, order, num_iterations, metric[zone][:, zone])
        return arb_rc(target, groups, order, num_iterations)

    magnitude = None
    if group_bitmap != "none":
        # salient entries count as zeros in the quantiles, as released
        magnitude = torch.where(is_salient, 0.0, values.abs())
    rest_fit = fit_zone(rest, 1, magnitude)
    salient_fit = None
    if len(chosen):
        magnitude = None
        if group_bitmap == "all":
            magnitude = values[:, chosen].abs()
            magnitude = magnitude[magnitude > 0]
        salient_fit = fit_zone(chosen, 2, magnitude)
    return BitmapFit(rest_fit, salient_fit, rest, chosen)
