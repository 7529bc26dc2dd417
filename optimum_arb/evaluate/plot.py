"""Pictures in files of their own: perplexity against true bits, the errors of the layers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..layer_warnings import layer_warnings
from ..output_files import check_writable, whole
from ..report import ModuleReport
from .drawing import load_pyplot, save_plain
from .figures import layer_figure

FORMATS = ("png", "svg")
PLOT_SUFFIXES = (".svg", ".png", ".pdf")


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Whether a picture can be written there.

    Raises:
        ValueError: an empty name, or another suffix than `PLOT_SUFFIXES`.
        OSError: as `check_writable`.
    """
    if not os.fspath(path):
        raise ValueError("The picture has an empty name.")
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(f"{path}: the picture is written as {', '.join(PLOT_SUFFIXES)}.")
    check_writable(path)


def plot_layers(modules: Sequence[ModuleReport], path: str | os.PathLike[str], title: str) -> Path:
    """Draws the error of each layer, a line for each kind of linear; held-out errors dotted, what looks broken ringed.

    Args:
        modules: of the report.
        path: a file, .svg, .png or .pdf.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, OSError: as `check_plot_path`.
    """
    check_plot_path(path)
    path = Path(path)
    # the dotted lines show what does not hold on other text
    flagged = [warning.module for warning in layer_warnings(modules) if warning.rule != "overfit"]
    figure = layer_figure([asdict(module) for module in modules], flagged)
    figure.axes[0].set_title(title, loc="left", fontsize=9)
    save_plain(figure, path)
    return path


def plot_comparison(rows: dict[str, dict[str, Any]], out: str | os.PathLike[str], title: str) -> list[Path]:
    """Draws the rows of `compare` into `compare.png` and `compare.svg`.

    Every point is labelled with its name; full precision is a line, since its bits are far to the right.

    Args:
        rows: name -> row.
        out: the directory.
        title: above the picture.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = {
        name: (row["bits_per_weight"], row["perplexity"]["perplexity"])
        for name, row in rows.items()
        if "error" not in row and name != "full" and math.isfinite(row["perplexity"]["perplexity"])
    }
    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    try:
        every = [bits for bits, _ in points.values()]
        middle = (min(every) + max(every)) / 2 if every else 0.0
        for name, (bits, value) in points.items():
            axes.scatter([bits], [value], color="tab:orange" if name.startswith("hqq") else "tab:blue", zorder=3)
            left = bits > middle  # so that no label leaves the picture
            axes.annotate(
                name, (bits, value), xytext=(-5 if left else 5, 4), textcoords="offset points", fontsize=8,
                ha="right" if left else "left",
            )  # fmt: skip
        full = rows["full"]["perplexity"]["perplexity"]
        axes.axhline(full, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            f"full precision: {full:.2f}", (1.0, full), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=8, color="0.3",
        )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        low, high = (bound([full, *(value for _, value in points.values())]) for bound in (min, max))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12, y=0.12)
        axes.set_xlabel("true bits per weight (every stored bit of the quantized linears)")
        axes.set_ylabel("perplexity (logarithmic)")
        axes.set_title(title, fontsize=10)
        axes.grid(True, which="major", color="0.9")
        paths = [Path(out) / f"compare.{kind}" for kind in FORMATS]
        for path in paths:
            kind = path.suffix.removeprefix(".")
            with whole(path) as unfinished:
                figure.savefig(unfinished, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    finally:
        pyplot.close(figure)
    return paths
