"""Binarized linears whose scales and signs receive gradients: the twins that refinement trains.

A twin computes what its `ARBLinear` does, from float32 masters of the scales, so that Adam's steps are not lost in
float16. Its signs are constants, or the signs of float32 latents: the product then sees the signs alone, and the
gradient of a sign goes to its latent as it is (the straight-through estimator of arXiv 1308.3432). A latent begins as
far from zero as turning its sign round would cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..format.factors import FactorizedWeight, pack_factors, unpack_factors
from ..format.hadamard import hadamard_matrices, multiply_blocks, rotate
from ..format.packing import BinarizedWeight, pack, unpack
from ..format.scales import Rounding
from ..nn import ARBFactorizedLinear, ARBLinear

# The range of a fresh latent: a sign that the fit would rather turn round (scales were fitted after it) turns first,
# and none is out of reach.
LEAST_CONFIDENCE, MOST_CONFIDENCE = 0.05, 2.0


class _Sign(torch.autograd.Function):
    """+1 where the latent is >= 0, else -1; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor) -> torch.Tensor:
        return torch.where(latent >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


class Trainable(nn.Module, ABC):
    """The trainable twin of a binarized linear.

    Args:
        packed: the layer. It is not changed until `write_back`; its bias is shared.
        signs: its sign matrices, bool.
        train_signs: whether the signs are trained too.

    Attributes:
        latents: float32, one for each sign matrix where the signs are trained, else none.
    """

    def __init__(self, packed: ARBLinear, signs: Sequence[torch.Tensor], train_signs: bool):
        super().__init__()
        object.__setattr__(self, "packed", packed)  # not as a submodule: its parameters are none of the twin's
        self.packed: ARBLinear
        self.train_signs = train_signs
        self.signs = list(signs)
        self._units: dict[int, torch.Tensor] = {}  # int8, of signs that are not trained
        self._changes: dict[int, tuple[int, torch.Tensor]] = {}  # first grid -> version of its scales, what rounds them
        self._roundings: dict[int, Rounding] = {}  # by the first grid
        latents = [nn.Parameter(torch.where(bits, 1.0, -1.0)) for bits in signs] if train_signs else []
        self.latents = nn.ParameterList(latents)
        self.bias = packed.bias
        # of scales in 8 bits; they are trained on it, since one layer's rounding at the end took back 0.0011 of 0.0026
        # nats that 12 steps of the last pass had gained
        self._set_grid(packed.packed().get("scale_grid"))

    @abstractmethod
    def scales(self) -> list[nn.Parameter]:
        """Scales and means, float32."""

    @abstractmethod
    def set_confidence(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> None:
        """Gives each latent the size of what turning its sign round would cost the linear's own outputs.

        If the weight changes by V where a sign is turned from -1 to +1, `E = W - Q` and `<X, Y> = tr(X H Y^T)`, turning
        a sign s costs `<V, V> (1 + 2 s <E, V> / <V, V>)`: the latent's size is what stands in brackets, cut to
        [0.05, 2].

        Args:
            weight: float `[N, K]`, the weight that was binarized, columns in the order of the inputs.
            hessian: `[K, K]`, X^T X of the inputs; None for the identity.
        """

    @abstractmethod
    def round_scales(self) -> None:
        """Makes the scales what they will be once they are packed."""

    @abstractmethod
    def write_back(self) -> None:
        """Packs what the twin has become into the layer that it came from."""

    @torch.no_grad()
    def current_signs(self) -> list[torch.Tensor]:
        """bool, matrix by matrix."""
        return [latent >= 0 for latent in self.latents] if self.train_signs else self.signs

    def _current(self, index: int) -> torch.Tensor:
        """A sign matrix as +-1: float32 with a gradient for its latent, or int8 where signs are not trained."""
        if self.train_signs:
            return _Sign.apply(self.latents[index])
        if index not in self._units:
            self._units[index] = self.signs[index].to(torch.int8).mul_(2).sub_(1)
        return self._units[index]

    def _store(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.packed._fill(tensors, None, tensors["weight"].device)

    def _set_grid(self, grid: torch.Tensor | None) -> None:
        """The grids of scales in 8 bits, `[grids, 2]`; rows of zeros stand for scales in 16."""
        self.scale_grid = grid
        self._changes.clear()
        self._roundings.clear()
        self._coded = [] if grid is None else grid.any(1).tolist()  # so that no step asks the device

    def _on_grid(self, scale: torch.Tensor, grids: slice) -> torch.Tensor:
        """Scales `[..., G]` on their grids, with the gradient as it is; those of 16 bits as they are."""
        if self.scale_grid is None or not any(self._coded[grids]):
            return scale
        first = grids.start or 0
        # a step needs it twice, since layers are computed again, and batches held out share it
        version, change = self._changes.get(first, (-1, scale))
        if version != scale._version:
            if first not in self._roundings:
                self._roundings[first] = Rounding(self.scale_grid[grids])
            with torch.no_grad():
                change = self._roundings[first](scale) - scale
            self._changes[first] = scale._version, change
        return scale + change

    def _set_signs(self, index: int, signs: torch.Tensor) -> None:
        """Other signs for a matrix; latents that were of another keep their size."""
        self.signs[index] = signs
        self._units.pop(index, None)
        if self.train_signs:
            latent = self.latents[index]
            latent.copy_(torch.where(signs, latent.abs(), -latent.abs().clamp_min(LEAST_CONFIDENCE)))

    def _set_latent(self, index: int, ratio: torch.Tensor) -> None:
        """By the `2 <E, V> / <V, V>` of its signs; where V is zero, neither finite nor of any weight."""
        sign = torch.where(self.signs[index], 1.0, -1.0)
        ratio = torch.where(torch.isfinite(ratio), ratio, 0.0)
        self.latents[index].copy_(sign * (1 + sign * ratio).clamp(LEAST_CONFIDENCE, MOST_CONFIDENCE))


def trainable(packed: ARBLinear, train_signs: bool) -> Trainable:
    """The twin of a binarized linear of any form."""
    if isinstance(packed, ARBFactorizedLinear):
        return TrainableFactors(packed, train_signs)
    return TrainablePlanes(packed, train_signs)


class TrainablePlanes(Trainable):
    """The twin of an `ARBLinear` of sign planes; its matrices of signs are the planes, those of the salient columns
    alone last."""

    def __init__(self, packed: ARBLinear, train_signs: bool = False):
        weight = packed.binarized()
        super().__init__(packed, [*weight.signs, *_each(weight.salient_signs)], train_signs)
        self.unpacked = weight
        self.layout, self.block_size = weight.layout, weight.block_size
        self.rows, self.columns = weight.shape
        self.row_scale = nn.Parameter(weight.row_scale.float())
        self.col_scale = _parameter(weight.col_scale)
        self.salient_col_scale = _parameter(weight.salient_col_scale)
        self.permutation, self.salient_columns = weight.permutation, weight.salient_columns
        if weight.hadamard:
            assert weight.input_signs is not None  # there are some where there is a transform
            self._input_signs = torch.where(weight.input_signs, 1.0, -1.0)
            self._matrices = hadamard_matrices(self.columns, weight.hadamard, device=self._input_signs.device)

    def scales(self) -> list[nn.Parameter]:
        return [scale for scale in (self.row_scale, self.col_scale, self.salient_col_scale) if scale is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.permutation is not None:
            x = x[..., self.permutation]
        if self.unpacked.hadamard:
            x = multiply_blocks(x * self._input_signs.to(x.dtype), self._matrices)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)

    def weight(self, fixed: Mapping[int, float] | None = None) -> torch.Tensor:
        """float32 `[N, K]` as it is stored, for transformed inputs, with gradients for scales and latents.

        Args:
            fixed: number of a plane -> a value that stands for all its signs.
        """
        width = self.columns if self.block_size == -1 else self.block_size
        signs = [self._plane(index, (fixed or {}).get(index)) for index in range(len(self.signs))]
        row_scales = self._on_grid(self.row_scale, slice(self.layout.row_scales)).unbind(-1)
        total: torch.Tensor | None = None
        for term in self.layout.terms:
            row = row_scales[term.row] * term.factor  # [N, blocks]
            value = row[:, :, None].expand(-1, -1, width).flatten(1)
            if value.shape[1] > self.columns:
                value = value[:, : self.columns]
            column = self._column(term.col, term.zone)
            if column is not None:
                value = value * column
            for plane in term.planes:
                value = value * signs[plane]
            total = value if total is None else total + value
        assert total is not None  # no layout is without terms
        return total

    def _plane(self, index: int, fixed: float | None) -> torch.Tensor:
        """`[N, K]`; zero outside the salient columns for a plane that is theirs alone."""
        if fixed is not None:
            plane = torch.full_like(self.signs[index], fixed, dtype=torch.float32)
        else:
            plane = self._current(index)
        return plane if index < self.layout.planes else self._spread(plane.float())

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the salient columns `[..., S]` at their places among all, zero elsewhere."""
        assert self.salient_columns is not None  # the layout says so
        every = torch.zeros(*values.shape[:-1], self.columns, device=values.device)
        return every.index_copy(values.ndim - 1, self.salient_columns, values)

    def _column(self, col: int | None, zone: str) -> torch.Tensor | None:
        """The column factor of a term `[K]`: its scale, zero outside its zone; None for 1 everywhere."""
        scale: torch.Tensor | None = None
        if col is not None and col < self.layout.col_scales:
            assert self.col_scale is not None  # the layout says so
            scale = self._on_grid(self.col_scale.T, slice(self.layout.row_scales, None))[:, col]
        elif col is not None:
            assert self.salient_col_scale is not None
            scale = self._spread(self.salient_col_scale[col - self.layout.col_scales])
        if zone == "all" or self.salient_columns is None:
            return scale
        inside = torch.zeros(self.columns, device=self.row_scale.device)
        inside[self.salient_columns] = 1.0
        if zone == "rest":
            inside = 1.0 - inside
        return inside if scale is None else scale * inside

    @torch.no_grad()
    def set_confidence(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> None:
        # V has one entry: <E, V> = (E H)_nk V_nk and <V, V> = V_nk^2 H_kk
        target = weight.to(torch.float32)
        metric = None if hessian is None else hessian.to(target)
        if self.permutation is not None:
            target = target[:, self.permutation]
            metric = None if metric is None else metric[self.permutation][:, self.permutation]
        if self.unpacked.hadamard:
            metric = torch.eye(self.columns, device=target.device) if metric is None else metric
            assert self.unpacked.input_signs is not None
            target, metric = rotate(target, metric, self.unpacked.input_signs, self.unpacked.hadamard)
        slope = target - self.weight()
        if metric is not None:
            slope = slope @ metric / metric.diagonal()
        for index in range(len(self.latents)):
            change = self.weight({index: 1.0}) - self.weight({index: -1.0})
            ratio = 2 * slope / change
            self._set_latent(index, ratio if index < self.layout.planes else ratio[:, self.salient_columns])

    @torch.no_grad()
    def binarized(self) -> BinarizedWeight:
        """What the twin has become, scales in float32; those of 8 bits are on their grids."""
        planes = self.current_signs()
        salient = planes[self.layout.planes :]
        return replace(
            self.unpacked,
            signs=torch.stack(planes[: self.layout.planes]),
            row_scale=self._on_grid(self.row_scale, slice(self.layout.row_scales)).detach(),
            col_scale=None
            if self.col_scale is None
            else self._on_grid(self.col_scale.T, slice(self.layout.row_scales, None)).T.detach(),
            salient_signs=torch.stack(salient) if salient else None,
            salient_col_scale=None if self.salient_col_scale is None else self.salient_col_scale.detach(),
        )

    @torch.no_grad()
    def round_scales(self) -> None:
        tensors = self._pack()
        self._set_grid(tensors.get("scale_grid"))
        stored = unpack(tensors, self.layout, self.columns, self.block_size, self.unpacked.hadamard)
        if self.packed.scale_bits == 8:  # packing makes the scales positive
            for index, signs in enumerate(stored.signs):
                self._set_signs(index, signs)
        for name in ("row_scale", "col_scale", "salient_col_scale"):
            scale = getattr(self, name)
            if scale is not None:
                scale.copy_(getattr(stored, name))

    @torch.no_grad()
    def write_back(self) -> None:
        self._store(self._pack())

    def _pack(self) -> dict[str, torch.Tensor]:
        return pack(self.binarized(), self.packed.scale_bits, self.scale_grid)


class TrainableFactors(Trainable):
    """The twin of an `ARBFactorizedLinear`; its matrices of signs are A, then B."""

    def __init__(self, packed: ARBFactorizedLinear, train_signs: bool = False):
        weight = packed.factorized()
        super().__init__(packed, [weight.outer_signs, weight.inner_signs], train_signs)
        self.row_scale = nn.Parameter(weight.row_scale.float())
        self.rank_scale = nn.Parameter(weight.rank_scale.float())
        self.col_scale = nn.Parameter(weight.col_scale.float())

    def scales(self) -> list[nn.Parameter]:
        return [self.row_scale, self.rank_scale, self.col_scale]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row_scale, rank_scale, col_scale = self._stored()
        inner = nn.functional.linear(x * col_scale, self._current(1).float()) * rank_scale
        y = nn.functional.linear(inner, self._current(0).float()) * row_scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @torch.no_grad()
    def set_confidence(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> None:
        outer = self._current(0) * self.row_scale[:, None] * self.rank_scale  # diag(a) A diag(m)
        inner = self._current(1) * self.col_scale  # B diag(b)
        slope = weight.to(torch.float32) - outer @ inner
        seen = inner  # B diag(b) H
        energy = torch.ones_like(self.col_scale)
        if hessian is not None:
            metric = hessian.to(slope)
            slope, seen, energy = slope @ metric, inner @ metric, metric.diagonal()
        # of A_nj: V is row j of B diag(b), times 2 a_n m_j, in row n
        change = 2 * self.row_scale[:, None] * self.rank_scale
        self._set_latent(0, 2 * (slope @ inner.T) / (change * (seen * inner).sum(1)))
        # of B_jk: V is column j of diag(a) A diag(m), times 2 b_k, in column k
        self._set_latent(1, (outer.T @ slope) / (outer.square().sum(0)[:, None] * self.col_scale * energy))

    def _stored(self) -> list[torch.Tensor]:
        """The scales of the rows, of the rank and of the columns, those of 8 bits on their grids."""
        return [self._on_grid(scale[:, None], slice(at, at + 1))[:, 0] for at, scale in enumerate(self.scales())]

    @torch.no_grad()
    def factorized(self) -> FactorizedWeight:
        """What the twin has become, scales in float32; those of 8 bits are on their grids."""
        return FactorizedWeight(*self.current_signs(), *self._stored())

    @torch.no_grad()
    def round_scales(self) -> None:
        tensors = self._pack()
        self._set_grid(tensors.get("scale_grid"))
        stored = unpack_factors(tensors, self.col_scale.shape[0])
        for index, signs in enumerate((stored.outer_signs, stored.inner_signs)):
            self._set_signs(index, signs)  # packing makes the scales positive
        for scale, value in zip(self.scales(), (stored.row_scale, stored.rank_scale, stored.col_scale), strict=True):
            scale.copy_(value)

    @torch.no_grad()
    def write_back(self) -> None:
        self._store(self._pack())

    def _pack(self) -> dict[str, torch.Tensor]:
        return pack_factors(self.factorized(), self.packed.scale_bits, self.scale_grid)


def _parameter(value: torch.Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.float())


def _each(planes: torch.Tensor | None) -> Sequence[torch.Tensor]:
    return () if planes is None else tuple(planes)
