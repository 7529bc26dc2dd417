"""Figures of models that are compared with their bfloat16 form: what is printed of them, and written as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

BAR = 0.95  # of bfloat16's speed, below which no figure should be


def model_name(planes: int | None) -> str:
    """Of a model of so many planes; None is bfloat16."""
    return "bfloat16" if planes is None else f"{planes} plane{'s' * (planes > 1)}"


@dataclass
class Figure:
    """One measurement.

    Attributes:
        name: what was measured, and its unit; with "tokens/s" more is better, else less.
        planes: of the model; None is bfloat16.
        batch, prompt: where, if that matters.
        value: the median of the calls.
        worst, best: of the calls.
        speed: whether it counts for the worst ratio of speed: at some batch and prompt.
        ratio: how many times as good as bfloat16's; None where there is nothing to compare with.
    """

    name: str
    planes: int | None
    batch: int | None
    prompt: int | None
    value: float
    worst: float
    best: float
    speed: bool
    ratio: float | None = None

    @property
    def more_is_better(self) -> bool:
        return "tokens/s" in self.name

    def line(self) -> str:
        where = [self.name, model_name(self.planes)]
        where += [] if self.batch is None else [f"batch {self.batch}"]
        where += [] if self.prompt is None else [f"prompt {self.prompt}"]
        spread = "" if self.worst == self.best else f" ({self.worst:.4g} to {self.best:.4g})"
        times = "" if self.ratio is None else f", {self.ratio:.2f} times as good as bfloat16"
        return f"{', '.join(where)}: {self.value:.4g}{spread}{times}"


class Figures:
    """All figures of a run, in the order in which they were measured; bfloat16's first of each."""

    def __init__(self) -> None:
        self.all: list[Figure] = []

    def add(
        self,
        name: str,
        planes: int | None,
        batch: int | None,
        prompt: int | None,
        found: list[float],
        *,
        speed: bool = False,
        base: str | None = None,
    ) -> Figure:
        """Keeps a figure, with its ratio to bfloat16's.

        Args:
            name, planes, batch, prompt, speed: see `Figure`.
            found: a value of each call.
            base: the name of bfloat16's figure, if it is another.
        """
        figure = Figure(name, planes, batch, prompt, statistics.median(found), max(found), min(found), speed)
        if figure.more_is_better:
            figure.worst, figure.best = figure.best, figure.worst
        other = None if planes is None else self.find(base or name, None, batch, prompt)
        if other is not None:
            ratio = figure.value / other.value
            figure.ratio = ratio if figure.more_is_better else 1 / ratio
        self.all.append(figure)
        return figure

    def find(self, name: str, planes: int | None, batch: int | None, prompt: int | None) -> Figure | None:
        key = (name, planes, batch, prompt)
        return next((f for f in self.all if (f.name, f.planes, f.batch, f.prompt) == key), None)

    def ratios(self) -> list[tuple[float, Figure]]:
        """Of speeds, the worst one first."""
        found = [(figure.ratio, figure) for figure in self.all if figure.speed and figure.ratio is not None]
        return sorted(found, key=lambda pair: pair[0])

    def verdict(self) -> str:
        """A sentence on the worst ratio of speed."""
        ratios = self.ratios()
        if not ratios:
            return "No speed was compared with bfloat16's."
        below = sum(ratio < BAR for ratio, _ in ratios)
        return f"Worst speed: {ratios[0][1].line()}. Of {len(ratios)} ratios of speed {below} are below {BAR}."

    def content(self) -> dict[str, Any]:
        """For JSON."""
        ratios = self.ratios()
        return {
            "figures": [asdict(figure) for figure in self.all],
            "worst": asdict(ratios[0][1]) if ratios else None,
            "compared": len(ratios),
            "below": sum(ratio < BAR for ratio, _ in ratios),
        }

    def table(self, planes: list[int | None]) -> str:
        """All as Markdown: a row for all models of one batch and prompt, ratios to bfloat16 behind the values."""
        heads = ["", "batch", "prompt", *map(model_name, planes)]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        order = list(dict.fromkeys(figure.name for figure in self.all))
        rows = dict.fromkeys((figure.name, figure.batch, figure.prompt) for figure in self.all)
        for name, batch, prompt in sorted(rows, key=lambda row: order.index(row[0])):
            cells = [name, *("" if number is None else str(number) for number in (batch, prompt))]
            for model in planes:
                found = self.find(name, model, batch, prompt)
                ratio = "" if found is None or found.ratio is None else f", {found.ratio:.2f}x"
                cells.append("-" if found is None else f"{found.value:.4g}{ratio}")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)
