"""Moves what llama.cpp's 1-bit type cannot hold, the order and the scales of columns, into the linear before.

In a gated MLP, `down(act(gate(x)) * up(x))`, the columns of `down` are the rows of `gate` and `up`. Their order may be
changed in all three together: exact. A column scale of `down` times the row of `up` is the same model, but for the
rounding of the row scales to float16. Other column scales and orders cannot move: q, k and v, or gate and up, read one
input that each of them scales and orders in its own way.
"""

from __future__ import annotations

import dataclasses

import torch

from ..format.packing import BinarizedWeight


@dataclasses.dataclass
class Linear:
    """A binarized linear and its bias, float `[N]` or None."""

    weight: BinarizedWeight
    bias: torch.Tensor | None = None


def take_rows(linear: Linear, order: torch.Tensor) -> Linear:
    """The linear whose output i is the old output `order[i]`."""
    weight = linear.weight
    salient = weight.salient_signs
    changed = dataclasses.replace(
        weight,
        signs=weight.signs[:, order],
        row_scale=weight.row_scale[order],
        salient_signs=None if salient is None else salient[:, order],
    )
    return Linear(changed, None if linear.bias is None else linear.bias[order])


def fold_mlp(gate: Linear, up: Linear, down: Linear, scales: bool = True) -> tuple[Linear, Linear, Linear, float]:
    """Moves the column order and the column scale of `down` into `gate` and `up`.

    Args:
        gate, up, down: the three linears of a gated MLP. `down` is left alone unless it is one plane whose inputs no
            Hadamard transform mixes.
        scales: whether column scales move too. Those that float16 cannot hold in `up` stay.

    Returns:
        The three, and the largest relative error that rounding a scale of `up` to float16 makes (0 where nothing was
        rounded).
    """
    weight = down.weight
    if len(weight.layout.terms) != 1 or weight.layout.terms[0].planes != (0,) or weight.hadamard:
        return gate, up, down, 0.0
    if weight.permutation is not None:
        gate, up = take_rows(gate, weight.permutation), take_rows(up, weight.permutation)
        weight = dataclasses.replace(weight, permutation=None)
    rounding = 0.0
    if scales and weight.col_scale is not None and not bool((weight.col_scale == 1).all()):
        col = weight.col_scale[0].float()
        exact = up.weight.row_scale.float() * col[:, None, None]
        rounded = exact.half().float()
        if not bool(rounded.isfinite().all()):
            return gate, up, Linear(weight, down.bias), 0.0
        nonzero = exact != 0
        rounding = float(((rounded - exact)[nonzero] / exact[nonzero]).abs().max()) if bool(nonzero.any()) else 0.0
        bias = None if up.bias is None else up.bias.float() * col
        up = Linear(dataclasses.replace(up.weight, row_scale=rounded), bias)
        weight = dataclasses.replace(weight, col_scale=torch.ones_like(weight.col_scale))
    return gate, up, Linear(weight, down.bias), rounding
