"""What the fits of a step make of their calibration matrix, divided over the ranks.

Two of the four steps of a decoder layer hold one linear, which one rank fits, and the linears of the others share a
matrix. Factorizing it is most of the work where it is large, and looks at no weight: preparing it, solving for the
correction of the weights, and `rho (H + rho I)^-1` of five values of rho are one rank's each, and go to those that fit.
Who solves and fits nothing also measures the outputs of the weights that are fitted, which their errors are divided by.
All have the bits that a rank that fits would have made: the same calls on the same matrix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..algorithms import outputs_energy
from ..algorithms.hessian import PreparedHessian
from ..algorithms.preparation import parts_of_damped, prepared_part
from ..algorithms.shared_work import Part, SharedWork
from ..config import ARBConfig
from ..modules import linear_weight
from .correction import Corrections
from .experts import LayerStatistics
from .ranks import Ranks
from .sending import Arrival, spread
from .workers import in_order

# Columns from which on this pays, by the kind of device; on others never. Of K columns, an inverse is some 3 K^3
# operations, 40 ms at 11008 on an H200, and sending its 2 K^2 bytes at 200 GB/s takes a thirtieth of that. Below, what
# counts is that the ranks tell each other what comes, six times a step: some 2 ms, which five inverses of 2048 columns
# take as well. Between hosts, where sending may be a hundred times slower, and on a CPU, where what is made beforehand
# would lie in memory that a fit does without, every rank makes its own.
LEAST: dict[str, int] = {"cuda": 2048}
# What is made at once on a CPU, each with some copies of the matrix.
AT_ONCE = 4

CHANGES = "changes"  # what is added to weights, among what goes by the place of a matrix


@dataclass
class _Matrix:
    """A calibration matrix.

    Attributes:
        hessian: `[K, K]`.
        names: of the linears that are fitted under it, on whichever rank.
        work: what the fits of this rank find made.
    """

    hessian: torch.Tensor
    names: list[str]
    work: SharedWork


class Division:
    """Divides the work of one step.

    Args:
        ranks: all of them.
        device: of this rank.
        choices: name of a linear -> its configuration; nothing is divided for others.
        owners: name -> the rank that fits it.
        shapes: name -> (rows, columns).
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        choices: Mapping[str, ARBConfig],
        owners: Mapping[str, int],
        shapes: Mapping[str, tuple[int, int]],
    ):
        self._ranks = ranks
        self._device = device
        self._choices = choices
        self._owners = owners
        self._columns = {name: shapes[name][1] for name in owners}
        self._arrivals: list[Arrival] = []
        # name of a linear -> the energy of its outputs on the calibration text, where another rank has measured it
        self.energies: dict[str, float] = {}
        fitted = [0] * ranks.size
        for name, rank in owners.items():
            fitted[rank] += math.prod(shapes[name])
        # those with least to fit first
        self._order = sorted(range(ranks.size), key=lambda rank: fitted[rank])

    def divides(self, name: str) -> bool:
        """Whether the work under the matrix of a linear is divided. The same on all ranks, and for all linears that may
        share it."""
        columns = self._columns[name]
        if self._ranks.size == 1 or not self._ranks.one_host or columns < LEAST.get(self._device.type, math.inf):
            return False
        alike = [other for other, count in self._columns.items() if count == columns]
        # the eigenvectors that arb-dbf wants are one call, and little beside its rounds
        return all(other in self._choices and not self._choices[other].factorized for other in alike)

    def needing(self, names: Sequence[str]) -> list[int]:
        """The ranks that need the matrix that some linears share."""
        return list(range(self._ranks.size)) if self.divides(names[0]) else self._fitting(names)

    def correcting(self, names: Sequence[str]) -> list[int]:
        """The ranks that need the sums of the corrections of some linears of a step."""
        return self._order[:1] if self.divides(names[0]) else self._fitting(names)

    def work(self, statistics: LayerStatistics, strength: float) -> dict[int, SharedWork]:
        """Does this rank's part of what is divided. All ranks call it at the same place.

        Args:
            statistics: of the step, summed. Its corrections are solved for where the matrix is divided.
            strength: of the error correction.

        Returns:
            by the id of a matrix, what the fits of this rank find made, or on its way.
        """
        matrices = self._matrices(statistics)
        corrections = statistics.corrections
        if matrices:
            if corrections is not None and self._ranks.rank != self._order[0]:
                corrections.sums = {}
            changes, damped = self._prepare(matrices, corrections, strength)
            self._invert(matrices, damped)
            if changes is not None and corrections is not None:
                changes.end()
                corrections.changes, self.energies = changes.take() or ({}, {})
        return {id(matrix.hessian): matrix.work for matrix in matrices}

    def finish(self) -> None:
        """Lets go of what sending holds, once the fits have ended."""
        for arrival in self._arrivals:
            arrival.end()
        self._arrivals.clear()

    def _fitting(self, names: Collection[str]) -> list[int]:
        return sorted({self._owners[name] for name in names})

    def _matrices(self, statistics: LayerStatistics) -> list[_Matrix]:
        """Those whose work is divided, the largest first."""
        found: dict[int, _Matrix] = {}
        for name in filter(self.divides, self._owners):
            hessian = statistics.linears.hessian(name)
            if hessian is not None:
                found.setdefault(id(hessian), _Matrix(hessian, [], SharedWork(hessian))).names.append(name)
        return sorted(found.values(), key=lambda matrix: -len(matrix.hessian))

    def _prepare(
        self, matrices: list[_Matrix], corrections: Corrections | None, strength: float
    ) -> tuple[Arrival | None, dict[tuple[int, Hashable], torch.Tensor]]:
        """Prepares each matrix, on a rank that fits under it, and solves for the corrections, on another if it can be.

        Returns:
            what is added to weights, where there are corrections; and the damped matrices, by the place of the matrix
            and the key of how it was prepared.
        """
        made = _Round(self._ranks, self._device, self._order)
        if corrections is not None:
            (matrix,) = matrices  # with error correction, all share one input
            solve = partial(self._solve, corrections, matrix, strength)
            made.add(CHANGES, len(matrix.hessian), solve, self._order[:1], self._fitting(matrix.names))
        parts: dict[tuple[int, Hashable], Part[PreparedHessian]] = {}
        for place, matrix in enumerate(matrices):
            fitting = self._fitting(matrix.names)
            for name in matrix.names:
                part = prepared_part(matrix.hessian, self._choices[name])
                if (place, part.key) not in parts:
                    parts[place, part.key] = part
                    whole = bool(parts_of_damped(matrix.hessian, self._choices[name]))
                    make = partial(_prepared, part, matrix.work, len(fitting) > 1, whole)
                    made.add((place, part.key), len(matrix.hessian), make, fitting, self._order)
        arrivals = made.run("exchanging prepared calibration matrices")
        damped = {}
        for key, part in parts.items():
            arrivals[key].end()
            found = arrivals[key].take()
            if found is not None:  # otherwise a fit will fail as well, and say of which linear
                prepared, damped[key] = found
                if prepared is not None:
                    matrices[key[0]].work.put(part, prepared)
        return arrivals.get(CHANGES), damped

    def _solve(
        self, corrections: Corrections, matrix: _Matrix, strength: float
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What is added to weights; and by their names the energies of their outputs, where this rank fits none: the
        one that prepares the matrix takes longer."""
        changes = corrections.solve(matrix.names, matrix.hessian, strength)
        if self._ranks.rank in self._fitting(matrix.names):
            return changes, {}
        spare = copy.copy(corrections)
        spare.changes = {name: change.clone() for name, change in changes.items()}
        return changes, {
            name: outputs_energy(linear_weight(spare.corrected(name)), matrix.hessian) for name in matrix.names
        }

    def _invert(self, matrices: list[_Matrix], damped: dict[tuple[int, Hashable], torch.Tensor]) -> None:
        """What fits make of the damped matrices."""
        found: dict[Hashable, tuple[Part[torch.Tensor], _Matrix, list[str]]] = {}
        for place, matrix in enumerate(matrices):
            for name in matrix.names:
                choices = self._choices[name]
                before = prepared_part(matrix.hessian, choices).key
                if (place, before) not in damped:
                    continue
                for part in parts_of_damped(damped[place, before], choices):
                    found.setdefault((place, before, part.key), (part, matrix, []))[2].append(name)
        # of five inverses on two ranks, fits use four while one rank makes the last
        whole = len(found) - len(found) % self._ranks.size
        for some in (list(found)[:whole], list(found)[whole:]):
            self._invert_some({key: found[key] for key in some})

    def _invert_some(self, parts: Mapping[Hashable, tuple[Part[torch.Tensor], _Matrix, list[str]]]) -> None:
        """Parts of matrices, with the linears whose fits want them."""
        if not parts:
            return
        made = _Round(self._ranks, self._device, self._order)
        for key, (part, matrix, names) in parts.items():
            made.add(key, len(matrix.hessian), part.make, self._order, self._fitting(names))
        arrivals = made.run("exchanging inverses of calibration matrices")
        self._arrivals += arrivals.values()
        for key, (part, matrix, names) in parts.items():
            value = arrivals[key].take()
            own = [name for name in names if self._owners[name] == self._ranks.rank]
            if own:
                # a fit with a Hadamard transform is preceded by others of some rows without
                uses = None if any(self._choices[name].hadamard for name in own) else len(own)
                matrix.work.put(part, value, uses, arrivals[key].end if uses == 1 else arrivals[key].wait)


class _Round:
    """What the ranks make at the same time and then send.

    Args:
        ranks: all of them.
        device: of this rank.
        order: the ranks; of those that have as little to do, the first gets what comes next.
    """

    def __init__(self, ranks: Ranks, device: torch.device, order: Sequence[int]):
        self._ranks = ranks
        self._device = device
        self._order = order
        self._loads = [0] * ranks.size
        self._tasks: dict[Hashable, Callable[[], Any]] = {}
        self._wanting: dict[Hashable, Collection[int]] = {}

    def add(
        self,
        key: Hashable,
        columns: int,
        make: Callable[[], Any],
        makers: Collection[int],
        wanting: Collection[int],
    ) -> None:
        """Something that one of the `makers` makes, of a matrix of so many columns, for the ranks that are `wanting`
        it."""
        maker = min((rank for rank in self._order if rank in makers), key=self._loads.__getitem__)
        self._loads[maker] += columns**3
        self._wanting[key] = wanting
        if maker == self._ranks.rank:
            self._tasks[key] = make

    def run(self, doing: str) -> dict[Hashable, Arrival]:
        """Makes this rank's part, and sends and receives."""
        results = in_order(lambda key: self._tasks[key](), list(self._tasks), self._device, AT_ONCE)
        own = dict(zip(self._tasks, results, strict=True))
        rank = self._ranks.rank
        return spread(self._ranks, own, self._device, doing, lambda key: rank in self._wanting[key])


def _prepared(
    part: Part[PreparedHessian], work: SharedWork, send: bool, whole: bool
) -> tuple[PreparedHessian | None, torch.Tensor | None] | None:
    """Prepares a matrix.

    Args:
        part: what is made.
        work: keeps it for this rank's fits.
        send: whether others want it too.
        whole: whether the damped matrix is wanted, from which others go on.

    Returns:
        What is sent: the matrix, made ready, and the damped one; None where it cannot be made.
    """
    try:
        prepared = part.make()
    except ValueError:
        return None
    work.put(part, prepared)
    return prepared if send else None, prepared.damped if whole else None
