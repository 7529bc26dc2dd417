"""What all plots share: matplotlib, colours that the page around them decides, axes, and files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..output_files import whole


@dataclass(frozen=True)
class Colors:
    """What a figure is drawn in.

    Attributes:
        ink, muted, grid: of text, of labels of axes, of lines of the grid.
        series: of the models or kinds; the first is the baseline's.
    """

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]

    @property
    def others(self) -> tuple[str, ...]:
        return self.series[1:]


# In a picture of its own, on white.
PLAIN = Colors(
    "#1d2330",
    "#667085",
    "#e4e7ec",
    ("#8a93a3", "#2f6bff", "#e4572e", "#0a9b6c", "#b25cd6", "#c98a00", "#1f9fd0", "#d6478c"),
)
# Stand-ins that `inline_svg` turns into the page's own colours, so that one drawing serves light and dark.
PAGE = Colors("#010101", "#010102", "#010103", tuple(f"#0102{index:02x}" for index in range(8)))
# A picture as wide as a phone, so that its text is not shrunk there.
WIDTH = 5.0


def load_pyplot() -> Any:
    """matplotlib's drawing functions, for files alone.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("Plots need matplotlib: pip install 'optimum-arb[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_matplotlib() -> None:
    """To be asked before hours of measuring.

    Raises:
        ImportError: matplotlib is not installed.
    """
    load_pyplot()


def new_axes(height: float, colors: Colors, width: float = WIDTH, panels: int = 1) -> tuple[Any, Any]:
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
    figure.patch.set_alpha(0)
    for one in axes[0]:
        one.patch.set_alpha(0)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            one.spines[side].set_color(colors.grid)
        one.tick_params(colors=colors.muted, which="both", labelsize=8, length=0)
        one.xaxis.label.set_color(colors.muted)
        one.yaxis.label.set_color(colors.muted)
        one.xaxis.label.set_size(8)
        one.yaxis.label.set_size(8)
        one.set_axisbelow(True)
    return figure, axes[0]


def model_colors(names: Sequence[str], baseline: str | None, colors: Colors) -> dict[str, str]:
    """A colour for each model, grey for the baseline."""
    others = [name for name in names if name != baseline]
    found = {name: colors.others[index % len(colors.others)] for index, name in enumerate(others)}
    return {name: found.get(name, colors.series[0]) for name in names}


def model_legend(figure: Any, of_model: Mapping[str, str], colors: Colors) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name, linewidth=0) for name, color in of_model.items()]
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=min(3, len(of_model)), fontsize=8, frameon=False,
        handlelength=0.9, handleheight=0.9, columnspacing=1.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(colors.ink)


def log_axis(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log")
    wide = max(values) > 300 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """Three figures, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def save_plain(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure that was drawn in `PLAIN` into a file of its own (.svg, .png, .pdf), and closes it."""
    figure.patch.set_facecolor("white")
    figure.patch.set_alpha(1)
    kind = Path(path).suffix.lower().removeprefix(".")
    try:
        with whole(path) as unfinished:
            figure.savefig(unfinished, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    finally:
        load_pyplot().close(figure)


def inline_svg(figure: Any, name: str, description: str) -> str:
    """A figure as an `<svg>` for a page, and closes it: no size of its own, colours and font from the page.

    Args:
        figure: drawn in `PAGE`.
        name: of the figure on the page; keeps its ids apart from those of other figures.
        description: what it shows, for screen readers.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    load_pyplot().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    rest = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', rest)
    rest = re.sub(r'(href="|url\()#', rf"\1#{name}-", rest)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", rest)
    rest = rest.replace(PAGE.ink, "var(--ink)").replace(PAGE.muted, "var(--muted)").replace(PAGE.grid, "var(--line)")
    for index, color in enumerate(PAGE.series):
        rest = rest.replace(color, f"var(--s{index})")
    # what matplotlib leaves unsaid is black
    return f'<svg {box.group()} role="img" aria-label="{description}" fill="currentColor">{rest.strip()}'
