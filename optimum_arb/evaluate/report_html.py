"""An evaluation as one page that needs nothing but itself: to look at, on a phone too, to send, to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..commands.printing import size
from .drawing import PAGE, Colors, inline_svg, model_colors
from .figures import bars_figure, latency_figure, layer_figure, quality_figure
from .report_style import CSS
from .report_tables import Headline, Table, baseline_of, disk, headlines, others, peak, resident, summary, tables

# Rows of the table of layers above which it is folded away; with their number in the line that opens it.
_FOLDED_ROWS = 12
_SHOWN_WARNINGS = 3


def html_report(
    report: Mapping[str, Any], comparison: Mapping[str, tuple[float, float]] | None = None, title: str | None = None
) -> str:
    """The page.

    Args:
        report: what `evaluation.evaluate` returned.
        comparison: more points of the plot of perplexity against bits, see `evaluation.read_comparison`.
        title: of the page; None names the models.

    Raises:
        ImportError: matplotlib is not installed.
    """
    made, models, baseline = tables(report), others(report), baseline_of(report)
    names = ", ".join(model["label"] for model in models)
    against = f' <span class="against">against {escape(baseline["label"])}</span>' if baseline else ""
    heading = escape(title) if title else f"{escape(names)}{against}"
    lead = escape(summary(report))
    body = [
        f'<header><p class="brand">optimum-arb evaluation</p><h1>{heading}</h1>'
        + (f'<p class="lead">{lead}</p>' if lead else "")
        + "</header>"
    ]
    for model in models:
        body.append(_headlines(model, baseline, named=len(models) > 1))
        body.append(_warnings(model))
    if "accuracy" in made:
        body.append(_section(made["accuracy"], [_quality(report, comparison or {})]))
    if "tasks" in made:
        body.append(_section(made["tasks"]))
    if any(model.get("modules") for model in models):
        body.append(_layers(models))
    if "memory" in made:
        body.append(_section(made["memory"], [_memory(report)]))
    if "latency" in made:
        rows = [row | {"model": model["label"]} for model in report["models"] for row in model.get("latency", [])]
        plot = latency_figure(rows, baseline["label"] if baseline else None, PAGE)
        body.append(_section(made["latency"], [_plot(plot, "latency", "Tokens per second by batch size")]))
    body += [_section(made[key]) for key in ("energy", "cost") if key in made]
    if any(model.get("generation") for model in report["models"]):
        body.append(_samples(report))
    body.append(_reproduce(report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title or names)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headlines(model: Mapping[str, Any], baseline: Mapping[str, Any] | None, named: bool) -> str:
    cards = "".join(_headline(found) for found in headlines(model, baseline))
    name = f"<h3>{escape(model['label'])}</h3>" if named else ""
    return f'{name}<div class="grid">{cards}</div>'


def _headline(found: Headline) -> str:
    bar = ""
    if found.share is not None:
        bar = f'<div class="bar"><i style="width:{min(1.0, max(0.0, found.share)):.1%}"></i></div>'
    kind = "value" if any(letter.isdigit() for letter in found.value) else "value word"
    return (
        f'<div class="card headline"><div class="label">{escape(found.label)}</div>'
        f'<div class="{kind}">{escape(found.value)}</div><div class="detail">{escape(found.detail)}</div>{bar}</div>'
    )


def _warnings(model: Mapping[str, Any]) -> str:
    """What looks broken, the first few in sight."""
    lines = [
        f'<div class="warning"><b>Looks broken:</b> <code>{escape(warning["module"])}</code>: '
        f"{escape(warning['message'])}.</div>"
        for warning in model.get("warnings", [])
    ]
    more = lines[_SHOWN_WARNINGS:]
    if not more:
        return "".join(lines)
    return (
        "".join(lines[:_SHOWN_WARNINGS])
        + f"<details><summary>{len(more)} more modules look broken</summary>{''.join(more)}</details>"
    )


def _section(table: Table, plots: Sequence[str] = ()) -> str:
    return (
        f"<section><h2>{escape(table.title)}</h2>{''.join(plots)}"
        f'<div class="card table scroll">{_table(table)}</div>'
        + (f'<p class="note">{escape(table.note)}</p>' if table.note else "")
        + "</section>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.headers)
    rows = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _plot(figure: Any, name: str, description: str, title: str = "", wide: bool = False) -> str:
    head = f"<h3>{escape(title)}</h3>" if title else ""
    svg = inline_svg(figure, name, escape(description, quote=True))
    return f'<div class="card plot{" wide" if wide else ""}">{head}{svg}</div>'


def _quality(report: Mapping[str, Any], comparison: Mapping[str, tuple[float, float]]) -> str:
    """Perplexity against bits, where there are points to be compared: of several models, or of a comparison."""
    points, full = [], None
    rows = [(name, bits, value) for name, (bits, value) in comparison.items() if name != "full"]
    for model in report["models"]:
        if not model.get("perplexity") or model["bits_per_weight"] is None:
            continue
        value = model["perplexity"][0]["perplexity"]
        if model["role"] == "baseline":
            full = (model["label"], value)
        else:
            points.append((model["label"], model["bits_per_weight"], value))
    if full is None and "full" in comparison:
        full = ("full precision", comparison["full"][1])
    if not points or len(points) + len(rows) < 2:
        return ""
    return _plot(quality_figure(points, full, rows, PAGE), "quality", "Perplexity against true bits per weight")


def _memory(report: Mapping[str, Any]) -> str:
    baseline = baseline_of(report)
    groups: dict[str, dict[str, float]] = {}
    for quantity, of in (("files", disk), ("resident", resident), ("peak", peak)):
        found = {model["label"]: of(model) for model in report["models"]}
        groups[quantity] = {name: value for name, value in found.items() if value is not None}
    figure = bars_figure(
        {quantity: group for quantity, group in groups.items() if group},
        lambda value: size(int(value)),
        baseline["label"] if baseline else None,
        PAGE,
    )
    return _plot(figure, "memory", "Bytes on disk, resident and at the peak")


def _layers(models: Sequence[Mapping[str, Any]]) -> str:
    parts = ["<section><h2>Layers</h2>"]
    for index, model in enumerate(models):
        modules = model.get("modules")
        if not modules:
            continue
        flagged = [warning["module"] for warning in model["warnings"] if warning["rule"] != "overfit"]
        parts.append(
            _plot(
                layer_figure(modules, flagged, PAGE),
                f"layers{index}",
                f"Relative output error of each layer of {model['label']}",
                model["label"] if len(models) > 1 else "",
                wide=True,
            )
        )
        rows = tuple(
            (
                module["name"],
                module["layout"],
                f"{module['bits_per_weight']:.3f}",
                *(_error(module[key]) for key in ("weight_error", "output_error", "held_out_error")),
            )
            for module in modules
        )
        heads = ("module", "layout", "bits", "weight error", "output error", "held-out error")
        table = f'<div class="card table scroll">{_table(Table("", heads, rows))}</div>'
        if len(rows) > _FOLDED_ROWS:
            table = f"<details><summary>All {len(rows)} binarized modules</summary>{table}</details>"
        parts.append(table)
    held_out = any(module["held_out_error"] is not None for model in models for module in model.get("modules", []))
    dotted = " Dotted: on held-out sequences." if held_out else ""
    parts.append(
        '<p class="note">Squared error of a layer\'s outputs on the calibration inputs over their squared norm, as the '
        f"run that binarized the model measured it: 0 is exact, 1 is no better than zeros.{dotted} A ring marks what "
        "looks broken.</p></section>"
    )
    return "".join(parts)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _samples(report: Mapping[str, Any]) -> str:
    models = [model for model in report["models"] if model.get("generation")]
    labels = [model["label"] for model in report["models"]]
    baseline = baseline_of(report)
    colors = model_colors(labels, baseline["label"] if baseline else None, _page_colors())
    parts = ["<section><h2>Samples</h2>"]
    for index, first in enumerate(models[0]["generation"]):
        texts = [model["generation"][index]["text"].strip() for model in models]
        same = _alike(texts) if len(texts) > 1 else 0
        said = "".join(
            f'<div><h4><span class="dot" style="background:{colors[model["label"]]}"></span>'
            f"{escape(model['label'])}</h4>"
            f'<p><span class="same">{escape(text[:same])}</span>{escape(text[same:])}</p></div>'
            for model, text in zip(models, texts, strict=True)
        )
        parts.append(
            f'<div class="card sample"><p class="prompt">{escape(first["prompt"])}</p>'
            f'<div class="said">{said}</div></div>'
        )
    alike = " What all begin with alike is grey." if len(models) > 1 else ""
    tokens = report["settings"]["sample_tokens"]
    parts.append(f'<p class="note">Greedy, at most {tokens} tokens.{alike}</p></section>')
    return "".join(parts)


def _alike(texts: Sequence[str]) -> int:
    """How many letters all texts begin with alike."""
    first, last = min(texts), max(texts)
    differing = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differing, min(len(first), len(last)))


def _page_colors() -> Colors:
    """The page's own variables."""
    return Colors("var(--ink)", "var(--muted)", "var(--line)", tuple(f"var(--s{index})" for index in range(8)))


def _reproduce(report: Mapping[str, Any]) -> str:
    block = report["reproduce"]
    pairs: list[tuple[str, str]] = [
        ("machine", f"{block['cpu']}, {block['cpu_count']} cores, {block['threads']} threads"),
        *(("GPU", name) for name in dict.fromkeys(block["gpus"])),
        ("system", f"Python {block['python']}, {block['platform']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in block["versions"].items())),
        ("seed", str(block.get("seed"))),
    ]
    for name, facts in (block.get("models") or {}).items():
        told = [text for text in (facts.get("revision"), facts.get("fingerprint")) if text]
        pairs.append((name, " ".join(told) or "not on this machine any more"))
    pairs += [(f"text {name}", fingerprint) for name, fingerprint in (block.get("datasets") or {}).items()]
    pairs += [(name, value) for name, value in block["environment"].items()]
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs)
    return (
        "<section><h2>Reproduce</h2>"
        f'<div class="card"><pre>{escape(block["command"])}</pre>'
        f"<details><summary>Versions, machine, fingerprints</summary><dl>{rows}</dl></details></div></section>"
    )
