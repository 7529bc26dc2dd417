"""The plots of the reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..layer_warnings import kind_of
from .drawing import PLAIN, Colors, log_axis, model_colors, model_legend, new_axes, short


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
    figure, (axes,) = new_axes(3.2, colors)
    values = [value for _, _, value in (*points, *others)] + ([full[1]] if full else [])
    for _, bits, value in others:
        axes.scatter([bits], [value], s=34, color=colors.series[0], zorder=3, linewidths=0)
    for index, (_, bits, value) in enumerate(points):
        axes.scatter([bits], [value], s=50, color=colors.others[index % len(colors.others)], zorder=4, linewidths=0)
    if full:
        axes.axhline(full[1], color=colors.series[0], linestyle=(0, (4, 3)), linewidth=1.2)
    if max(values) > 3 * min(values):
        log_axis(axes.yaxis, values)
    axes.margins(x=0.25, y=0.18)
    axes.set_xlabel("true bits per weight")
    axes.set_ylabel("perplexity" + (" (log)" if axes.get_yscale() == "log" else ""))
    axes.grid(True, axis="y", color=colors.grid, linewidth=0.8)
    if full:
        axes.annotate(
            f"{full[0]}  {short(full[1])}", (0, full[1]), xycoords=("axes fraction", "data"), xytext=(3, -4),
            textcoords="offset points", fontsize=8, color=colors.muted, va="top",
        )  # fmt: skip
    _label_points(figure, axes, [(f"{n}  {short(v)}", b, v, colors.ink) for n, b, v in points])
    _label_points(figure, axes, [(f"{n}  {short(v)}", b, v, colors.muted) for n, b, v in others])
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
    figure, (axes,) = new_axes(3.4, colors, width)
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
        log_axis(axes.yaxis, shown)
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
    figure, (axes,) = new_axes(0.55 + 0.24 * rows, colors)
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
    model_legend(figure, of_model, colors)
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
    figure, panels = new_axes(2.9, colors, panels=2)
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
                log_axis(axes.yaxis, values)
            axes.margins(x=0.12, y=0.18)
        else:
            axes.set_xticks([])
            axes.set_xlabel(f"batch size {sizes[0]}")
            axes.margins(y=0.15)
        axes.set_title(title, loc="left", fontsize=8.5, color=colors.ink)
        axes.grid(True, axis="y", color=colors.grid, linewidth=0.8)
    panels[0].set_ylabel("tokens per second")
    model_legend(figure, of_model, colors)
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short_kind(kind: str) -> str:
    """ "model.layers.*.mlp.up_proj" -> "up_proj"."""
    return kind.rpartition("*.")[2].rpartition(".")[2]
