"""The plots of the reports: drawn by matplotlib, in colours that the page around them decides."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..layer_warnings import kind_of


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


def _pyplot() -> Any:
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
    _pyplot()


def _axes(height: float, colors: Colors, width: float = WIDTH, panels: int = 1) -> tuple[Any, Any]:
    pyplot = _pyplot()
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


def quality_figure(
    points: Sequence[tuple[str, float, float]],
    full: tuple[str, float] | None,
    others: Sequence[tuple[str, float, float]] = (),
    colors: Colors = PLAIN,
) -> Any:
    """Perplexity against true bits per weight.

    Args:
        points: name, bits, perplexity of the models.
        full: name and perplexity of the float model, a line, since its bits are far to the right.
        others: more points, in grey, to see the models beside.
        colors: see `Colors`.
    """
    figure, (axes,) = _axes(3.2, colors)
    values = [value for _, _, value in (*points, *others)] + ([full[1]] if full else [])
    for _, bits, value in others:
        axes.scatter([bits], [value], s=34, color=colors.series[0], zorder=3, linewidths=0)
    for index, (_, bits, value) in enumerate(points):
        axes.scatter([bits], [value], s=50, color=colors.others[index % len(colors.others)], zorder=4, linewidths=0)
    if full:
        axes.axhline(full[1], color=colors.series[0], linestyle=(0, (4, 3)), linewidth=1.2)
    if max(values) > 3 * min(values):
        _log_axis(axes.yaxis, values)
    axes.margins(x=0.25, y=0.18)
    axes.set_xlabel("true bits per weight")
    axes.set_ylabel("perplexity" + (" (log)" if axes.get_yscale() == "log" else ""))
    axes.grid(True, axis="y", color=colors.grid, linewidth=0.8)
    if full:
        axes.annotate(
            f"{full[0]}  {_short(full[1])}", (0, full[1]), xycoords=("axes fraction", "data"), xytext=(3, -4),
            textcoords="offset points", fontsize=8, color=colors.muted, va="top",
        )  # fmt: skip
    _label_points(figure, axes, [(f"{n}  {_short(v)}", b, v, colors.ink) for n, b, v in points])
    _label_points(figure, axes, [(f"{n}  {_short(v)}", b, v, colors.muted) for n, b, v in others])
    return figure


def _label_points(figure: Any, axes: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each label at the first side of its point where it covers no other label and no point.

    Args:
        figure, axes: with all points and the limits of the axes in place.
        labels: text, x, y, colour.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    dots = [axes.transData.transform(offset) for artist in axes.collections for offset in artist.get_offsets()]
    sides = (
        {"xytext": (0, 7), "ha": "center", "va": "bottom"},
        {"xytext": (0, -7), "ha": "center", "va": "top"},
        {"xytext": (7, 0), "ha": "left", "va": "center"},
        {"xytext": (-7, 0), "ha": "right", "va": "center"},
    )
    for text, x, y, color in labels:
        taken = [label.get_window_extent() for label in axes.texts]
        taken += [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in dots]
        for last, side in enumerate(sides, 1):
            label = axes.annotate(text, (x, y), textcoords="offset points", fontsize=8, color=color, **side)
            if last == len(sides) or not any(label.get_window_extent().overlaps(other) for other in taken):
                break
            label.remove()


def layer_figure(
    modules: Sequence[Mapping[str, Any]], flagged: Iterable[str] = (), colors: Colors = PLAIN, width: float = 7.2
) -> Any:
    """Each layer's relative output error (weight error without calibration), a line for each kind of linear.

    Args:
        modules: with `name`, `weight_error`, `output_error` and `held_out_error`, as the report has them.
        flagged: names of the modules that look broken; they get a ring.
        width: inches.
    """
    calibrated = any(module["output_error"] is not None for module in modules)
    held_out = any(module["held_out_error"] is not None for module in modules)
    key = "output_error" if calibrated else "weight_error"
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for module in modules:
        numbers = [int(part) for part in module["name"].split(".") if part.isdigit()]
        kinds.setdefault(kind_of(module["name"]), []).append((numbers[0] if numbers else 0, module))
    figure, (axes,) = _axes(3.4, colors, width)
    flagged, shown = set(flagged), []
    for index, (kind, entries) in enumerate(kinds.items()):
        color = colors.others[index % len(colors.others)]
        known = [(at, m[key]) for at, m in entries if m[key] is not None and m[key] > 0 and math.isfinite(m[key])]
        shown += [value for _, value in known]
        style = "-" if index < len(colors.others) else "--"
        axes.plot(
            *_columns(known), style, color=color, linewidth=1.5, marker="o", markersize=3, label=_short_kind(kind)
        )
        if held_out and calibrated:
            other = [(at, m["held_out_error"]) for at, m in entries if m["held_out_error"] is not None]
            other = [(at, value) for at, value in other if value > 0 and math.isfinite(value)]
            shown += [value for _, value in other]
            axes.plot(*_columns(other), linestyle=(0, (1, 1.5)), color=color, linewidth=1.3)
        rings = [(at, m[key]) for at, m in entries if m["name"] in flagged and m[key] is not None and m[key] > 0]
        if rings:
            axes.scatter(
                *_columns(rings), s=90, facecolors="none", edgecolors=colors.series[2], linewidths=1.6, zorder=4
            )
    if held_out and calibrated:
        axes.plot([], [], linestyle=(0, (1, 1.5)), color=colors.ink, linewidth=1.3, label="held-out")
    if shown and max(shown) > 5 * min(shown):
        _log_axis(axes.yaxis, shown)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative output error" if calibrated else "relative weight error")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, axis="y", color=colors.grid, linewidth=0.8)
    legend = figure.legend(
        loc="outside upper center", ncols=min(8, 1 + len(kinds)), fontsize=8, frameon=False, handlelength=1.2,
        columnspacing=1.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(colors.ink)
    return figure


def bars_figure(
    groups: Mapping[str, Mapping[str, float]],
    label: Callable[[float], str],
    baseline: str | None = None,
    colors: Colors = PLAIN,
) -> Any:
    """Horizontal bars: for each quantity, one bar a model, with its value and what part of the baseline's that is.

    Args:
        groups: quantity -> model -> value.
        label: makes the text of a value.
        baseline: the model that the shares refer to.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    rows = len(groups) * (len(names) + 0.7)
    figure, (axes,) = _axes(0.55 + 0.24 * rows, colors)
    of_model = model_colors(names, baseline, colors)
    at, ticks = 0.0, []
    longest = max((value for group in groups.values() for value in group.values()), default=1.0)
    for quantity, group in groups.items():
        start = at
        for name, value in group.items():
            axes.barh([at], [value], height=0.82, color=of_model[name], linewidth=0)
            text = label(value)
            if baseline is not None and name != baseline and group.get(baseline) and value > 0:
                text += f"  ({value / group[baseline]:.0%})"
            axes.annotate(
                text,
                (value, at),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=colors.ink,
            )
            at += 1
        ticks.append(((start + at - 1) / 2, quantity))
        at += 0.7
    axes.set_yticks([tick for tick, _ in ticks], [quantity for _, quantity in ticks])
    axes.tick_params(axis="y", colors=colors.ink, labelsize=8.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, longest * 1.5)
    axes.invert_yaxis()
    _model_legend(figure, of_model, colors)
    return figure


def latency_figure(rows: Sequence[Mapping[str, Any]], baseline: str | None = None, colors: Colors = PLAIN) -> Any:
    """Throughput of prompt and generation against the batch size, a line for each model.

    Args:
        rows: with `model`, `batch_size`, `prefill_tokens_per_second`, `decode_tokens_per_second`.
        baseline: the model that is drawn in grey.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    sizes = sorted({row["batch_size"] for row in rows})
    of_model = model_colors(names, baseline, colors)
    figure, panels = _axes(2.9, colors, panels=2)
    for axes, key, title in zip(
        panels, ("prefill_tokens_per_second", "decode_tokens_per_second"), ("prompt", "generation"), strict=True
    ):
        values = []
        for name in names:
            found = [(sizes.index(row["batch_size"]), row[key]) for row in rows if row["model"] == name]
            values += [value for _, value in found]
            if len(sizes) == 1:
                axes.bar([names.index(name)], [found[0][1]], width=0.7, color=of_model[name], linewidth=0)
            else:
                axes.plot(*_columns(found), color=of_model[name], linewidth=1.8, marker="o", markersize=5)
            for _, value in found if len(sizes) == 1 else ():
                axes.annotate(
                    f"{value:,.1f}", (names.index(name), value), xytext=(0, 4), textcoords="offset points", ha="center",
                    fontsize=7.5, color=colors.ink,
                )  # fmt: skip
        if len(sizes) > 1:
            axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            axes.set_xlabel("batch size")
            if max(values) > 5 * min(values):
                _log_axis(axes.yaxis, values)
            axes.margins(x=0.12, y=0.18)
        else:
            axes.set_xticks([])
            axes.set_xlabel(f"batch size {sizes[0]}")
            axes.margins(y=0.15)
        axes.set_title(title, loc="left", fontsize=8.5, color=colors.ink)
        axes.grid(True, axis="y", color=colors.grid, linewidth=0.8)
    panels[0].set_ylabel("tokens per second")
    _model_legend(figure, of_model, colors)
    return figure


def model_colors(names: Sequence[str], baseline: str | None, colors: Colors) -> dict[str, str]:
    """A colour for each model, grey for the baseline."""
    others = [name for name in names if name != baseline]
    found = {name: colors.others[index % len(colors.others)] for index, name in enumerate(others)}
    return {name: found.get(name, colors.series[0]) for name in names}


def _model_legend(figure: Any, of_model: Mapping[str, str], colors: Colors) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name, linewidth=0) for name, color in of_model.items()]
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=min(3, len(of_model)), fontsize=8, frameon=False,
        handlelength=0.9, handleheight=0.9, columnspacing=1.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(colors.ink)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log")
    wide = max(values) > 300 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """Three figures, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _short_kind(kind: str) -> str:
    """ "model.layers.*.mlp.up_proj" -> "up_proj"."""
    return kind.rpartition("*.")[2].rpartition(".")[2]


def save_plain(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure that was drawn in `PLAIN` into a file of its own (.svg, .png, .pdf), and closes it."""
    figure.patch.set_facecolor("white")
    figure.patch.set_alpha(1)
    try:
        figure.savefig(path, dpi=160, metadata={"Date": None} if os.fspath(path).endswith(".svg") else None)
    finally:
        _pyplot().close(figure)


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
    _pyplot().close(figure)
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
