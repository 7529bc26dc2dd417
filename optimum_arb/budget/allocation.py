"""Mixed precision: which linear gets how many bits, from the output error that each choice was measured to leave.

The sum over the matrices of `tr(E H E^T) / tr(W H W^T)` is made as small as a budget of stored bits allows. Every
matrix counts the same, whatever its size: a decoder layer passes through each of them, and an error in a small key
projection is as much an error as one in a large down projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One way to binarize a matrix.

    Attributes:
        bits: all bits that it would store.
        error: its relative output error.
        settings: what to put into the configuration for it (`{"planes": 2}`, `{"rank": 288}`).
    """

    bits: int
    error: float
    settings: Mapping[str, Any]


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """The choice of each matrix with the least sum of errors whose bits are within the budget.

    Lagrange's method on the lower convex hull of each matrix' choices: all take the step along their hull that lowers
    the error most for its bits, as long as the budget lasts; what is left then goes to the smaller steps that still
    fit. The sum is within one step of the optimum. Same choices, same result: ties go by name.

    Args:
        choices: name -> its possible choices, at least one.
        budget: bits for all of them together.

    Returns:
        name -> the choice, in the order of `choices`.

    Raises:
        ValueError: the smallest choices together exceed the budget, or an error is not finite.
    """
    for name, options in choices.items():
        for option in options:
            if not math.isfinite(option.error) or option.error < 0 or option.bits < 1:
                raise ValueError(f"{name}: a choice of {option.bits} bits with an error of {option.error} is none.")
    hulls = {name: lower_hull(options) for name, options in choices.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bits for hull in hulls.values())
    if left < 0:
        raise ValueError(
            f"The budget of {budget:,} bits is below the {budget - left:,} that the smallest choices of all modules "
            "take together: raise target_bits_per_weight, or leave modules out with modules_to_not_convert."
        )
    steps = []
    for name, hull in hulls.items():
        for index in range(1, len(hull)):
            gain = (hull[index - 1].error - hull[index].error) / (hull[index].bits - hull[index - 1].bits)
            steps.append((-gain, name, index))
    # on a convex hull gains fall from step to step, so the steps of one matrix come in their order
    for _, name, index in sorted(steps):
        cost = hulls[name][index].bits - hulls[name][at[name]].bits
        if index == at[name] + 1 and cost <= left:
            at[name] = index
            left -= cost
    taken = {name: hull[at[name]] for name, hull in hulls.items()}
    for name, options in choices.items():
        better = [o for o in options if o.error < taken[name].error and o.bits - taken[name].bits <= left]
        if better:
            best = min(better, key=lambda option: (option.error, option.bits))
            left -= best.bits - taken[name].bits
            taken[name] = best
    return taken


def lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of error over bits, by rising bits and falling error."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda option: (option.bits, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while hull and hull[-1].bits == option.bits:
            hull.pop()
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            # the middle one lies on or above the line from the first to the new one
            if (second.error - first.error) * (option.bits - first.bits) >= (option.error - first.error) * (
                second.bits - first.bits
            ):
                hull.pop()
            else:
                break
        hull.append(option)
    return hull


def interpolate(measured: Sequence[tuple[int, float]], bits: Sequence[int]) -> list[float]:
    """Errors at numbers of bits between (and beyond) measured ones.

    The logarithm of the error is taken for piecewise linear in the bits, which it nearly is where each further bit
    lowers the error by about the same factor; beyond the ends the last piece goes on.

    Args:
        measured: (bits, error), at least one, bits distinct. One alone is the error at all bits.
        bits: where errors are wanted.
    """
    points = sorted((b, math.log(max(error, 1e-12))) for b, error in measured)
    if len(points) == 1:  # a linear so small that all sizes that are tried are the smallest rank
        return [math.exp(points[0][1])] * len(bits)
    found = []
    for wanted in bits:
        index = next((i for i in range(1, len(points) - 1) if wanted <= points[i][0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        found.append(math.exp(y0 + (y1 - y0) * (wanted - x0) / (x1 - x0)))
    return found
