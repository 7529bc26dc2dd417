"""The figures of an evaluation as tables and as headlines, which the terminal, Markdown and the page share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..commands.printing import size

DASH = "-"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        headers: of the columns; the first holds names, the others figures.
        rows: as many cells each as there are headers.
        note: how it was measured.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """One figure in large type.

    Attributes:
        label: what it is.
        value: with its unit.
        detail: what it stands beside.
        share: of the baseline's figure, for a bar; None draws none.
    """

    label: str
    value: str
    detail: str = ""
    share: float | None = None


def figure(value: float | None, digits: int = 2) -> str:
    """A number with thousands apart; large ones without decimals."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    """A ratio."""
    return DASH if value is None else f"{figure(value)}×"  # noqa: RUF001


def percent(value: float | None) -> str:
    """A share."""
    return DASH if value is None else f"{value:.1%}"


def seconds(value: float) -> str:
    """A time in the unit in which it is read."""
    if value < 1:
        return f"{value * 1e3:,.1f} ms"
    return f"{value:,.2f} s"


def baseline_of(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The baseline's results."""
    return next((model for model in report["models"] if model["role"] == "baseline"), None)


def others(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of the models."""
    return [model for model in report["models"] if model["role"] == "model"]


def resident(model: Mapping[str, Any]) -> int | None:
    """Resident bytes: the GPUs' where it runs on one."""
    memory = model.get("memory")
    if not memory:
        return None
    return memory["gpu_resident"] or memory["resident"]


def peak(model: Mapping[str, Any]) -> int | None:
    """The most memory: the GPUs' where it runs on one."""
    memory = model.get("memory")
    if not memory:
        return None
    return memory["gpu_peak"] or memory["peak"]


def ratio(model: Mapping[str, Any], baseline: Mapping[str, Any] | None, of: Any) -> float | None:
    """A figure of a model over the baseline's."""
    ours, theirs = of(model), None if baseline is None else of(baseline)
    return None if ours is None or not theirs else ours / theirs


def disk(model: Mapping[str, Any]) -> int | None:
    """Bytes of the weights' files."""
    return model["disk"]["weights"] if model.get("disk") else None


def headlines(model: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[Headline]:
    """What a reader wants to know of a model first."""
    found = []
    if model["bits_per_weight"] is not None:
        whole = baseline["bits_per_weight"] if baseline else None
        share = model["bits_per_weight"] / whole if whole else None
        detail = f"of {figure(whole, 0)}" if whole else "every stored bit counted"
        found.append(Headline("Bits per weight", figure(model["bits_per_weight"]), detail, share))
    for label, of in (("Files", disk), ("Memory in use", resident)):
        count = of(model)
        if count is not None:
            share = ratio(model, baseline, of)
            detail = f"{percent(share)} of {size(of(baseline or {}) or 0)}" if share is not None else ""
            found.append(Headline(label, size(count), detail, share))
    for row in model.get("perplexity", [])[:1]:
        detail = row["text"]
        if baseline and baseline.get("perplexity"):
            other = baseline["perplexity"][0]["perplexity"]
            detail = f"{times(row['perplexity'] / other)} the base's {figure(other)}"
        found.append(Headline("Perplexity", figure(row["perplexity"]), detail))
    for row in model.get("divergence", [])[:1]:
        detail = f"KL divergence {figure(row['kl_divergence'], 3)} nats"
        found.append(Headline("Same next token", percent(row["top1_agreement"]), detail, row["top1_agreement"]))
    for row in model.get("latency", [])[:1]:
        detail = f"batch {row['batch_size']}"
        if row["decode_speedup"] is not None:
            detail = f"{times(row['decode_speedup'])} the base's speed, {detail}"
        found.append(Headline("Generation", f"{figure(row['decode_tokens_per_second'], 1)} tok/s", detail))
    if "energy" in model:
        energy = model["energy"]
        value = f"{figure(energy['joules_per_token'])} J/tok" if energy["available"] else "not available"
        share = ratio(model, baseline, lambda m: m.get("energy", {}).get("joules_per_token"))
        detail = "no counter that can be read" if not energy["available"] else ""
        detail = f"{percent(share)} of the base's" if share is not None else detail
        found.append(Headline("Energy", value, detail, share))
    for row in model.get("cost", [])[:1]:
        value = f"{figure(row['generated_million_tokens'])} {row['currency']}"
        found.append(Headline("Cost", value, f"a million generated tokens, batch {row['batch_size']}"))
    return found


def tables(report: Mapping[str, Any]) -> dict[str, Table]:
    """All figures, by section; a section that was not measured is absent."""
    made = {
        "accuracy": _accuracy(report),
        "tasks": _tasks(report),
        "memory": _memory(report),
        "latency": _latency(report),
        "energy": _energy(report),
        "cost": _cost(report),
    }
    return {name: table for name, table in made.items() if table.rows}


def _accuracy(report: Mapping[str, Any]) -> Table:
    rows, note = [], ""
    for model in report["models"]:
        for index, found in enumerate(model.get("perplexity", [])):
            apart = (model.get("divergence") or [{}] * (index + 1))[index]
            interval = apart.get("ratio_interval")
            whole = times(apart.get("perplexity_ratio"))
            if interval:
                whole += f" ({figure(interval[0])} to {figure(interval[1])})"
            rows.append(
                (
                    model["label"],
                    found["text"],
                    figure(model["bits_per_weight"]),
                    figure(found["perplexity"]),
                    whole,
                    figure(apart.get("kl_divergence"), 3),
                    figure(apart.get("kl_99"), 3),
                    percent(apart.get("top1_agreement")),
                )
            )
            note = (
                f"{found['windows']} windows of {found['context_length']:,} tokens without overlap, "
                f"{found['tokens']:,} tokens predicted. In brackets: the 95 % interval of the ratio, from the windows' "
                "paired differences. KL divergence of the model from its baseline in nats a token: mean and 99th "
                "percentile."
            )
    if not rows:  # the divergence alone
        for model in report["models"]:
            for found in model.get("divergence", []):
                cells = (figure(found["kl_divergence"], 3), figure(found["kl_99"], 3), percent(found["top1_agreement"]))
                bits = figure(model["bits_per_weight"])
                rows.append((model["label"], found["text"], bits, DASH, times(found["perplexity_ratio"]), *cells))
    heads = ("model", "text", "true bits", "perplexity", "ratio", "KL mean", "KL 99 %", "same next token")
    dtypes = ", ".join(dict.fromkeys(model["dtype"] for model in report["models"] if "dtype" in model))
    return Table("Accuracy", heads, tuple(rows), note + (f" In {dtypes}." if note else ""))


def _tasks(report: Mapping[str, Any]) -> Table:
    rows = []
    for model in report["models"]:
        for task, metrics in model.get("tasks", {}).items():
            for key, value in metrics.items():
                name = key.partition(",")[0]
                if name.endswith("_stderr") or name in ("sample_len", "name", "sample_count"):
                    continue
                error = metrics.get(key.replace(name, f"{name}_stderr", 1))
                rows.append((model["label"], task, name, figure(value, 4), "" if error is None else f"± {error:.4f}"))
    return Table(
        "Tasks", ("model", "task", "metric", "value", "error"), tuple(rows), "Measured by lm-evaluation-harness."
    )


def _memory(report: Mapping[str, Any]) -> Table:
    rows, baseline, note = [], baseline_of(report), ""
    for model in report["models"]:
        if "memory" not in model:
            continue
        memory = model["memory"]
        share = ratio(model, baseline, resident) if model["role"] == "model" else None
        rows.append(
            (
                model["label"],
                size(disk(model) or 0),
                size(memory["parameters"]),
                size(resident(model) or 0),
                percent(share),
                size(peak(model) or 0),
                f"{memory['seconds']:.1f} s",
            )
        )
        note = (
            "Each model in a process of its own: resident and peak memory beyond what the process had before it loaded "
            f"the model, after and during a prompt of {memory['prompt_tokens']} tokens and {memory['new_tokens']} new "
            "ones" + (", on the GPU (torch's allocator)." if memory["gpu_resident"] else ".")
        )
    heads = ("model", "weights' files", "tensors", "resident", "of baseline", "peak", "loading")
    return Table("Memory", heads, tuple(rows), note)


def _latency(report: Mapping[str, Any]) -> Table:
    rows, note = [], ""
    for model in report["models"]:
        for row in model.get("latency", []):
            rows.append(
                (
                    model["label"],
                    str(row["batch_size"]),
                    seconds(row["prefill_seconds"]),
                    figure(row["prefill_tokens_per_second"], 1),
                    times(row["prefill_speedup"]),
                    seconds(row["decode_seconds"]),
                    seconds(row["slowest_decode_seconds"]),
                    figure(row["decode_tokens_per_second"], 1),
                    times(row["decode_speedup"]),
                )
            )
            note = _latency_note(report, row)
    heads = (
        "model", "batch", "first token", "prompt tok/s", "speedup", "each further", "slowest 5 %", "generated tok/s",
        "speedup",
    )  # fmt: skip
    return Table("Speed", heads, tuple(rows), note)


def _latency_note(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    block = report["reproduce"]
    threads = block["threads"]
    where = ", ".join([f"{threads} CPU thread{'s' if threads != 1 else ''}", *dict.fromkeys(block["gpus"])])
    note = (
        f"Prompts of {row['prompt_tokens']} tokens, {row['new_tokens']} new ones; medians of {row['repeats']} rounds "
        f"in which model and baseline take turns; {where}. A speedup is the median over the rounds of the baseline's "
        "time over the model's."
    )
    return note + (" The baseline's own row is of its rounds beside the last model." if len(others(report)) > 1 else "")


def _energy(report: Mapping[str, Any]) -> Table:
    rows, note = [], ""
    for model in report["models"]:
        energy = model.get("energy")
        if energy is None:
            continue
        if not energy["available"]:
            rows.append((model["label"], "not available", DASH, DASH))
            note = f"No counter could be read: {'; '.join(energy['missing'])}."
            continue
        rows.append(
            (
                model["label"],
                f"{figure(energy['joules_per_token'], 3)} J",
                f"{figure(energy['watts'], 1)} W",
                f"{figure(energy['idle_watts'], 1)} W",
            )
        )
        note = (
            f"Counters of {', '.join(energy['joules'])}, whole devices with all that runs on them, over "
            f"{energy['seconds']:.0f} seconds of generation at batch {energy['batch_size']}; the power at rest is not "
            "taken off." + (f" Not counted: {'; '.join(energy['missing'])}." if energy["missing"] else "")
        )
    return Table("Energy", ("model", "a token", "power", "at rest"), tuple(rows), note)


def _cost(report: Mapping[str, Any]) -> Table:
    rows = []
    for model in report["models"]:
        for row in model.get("cost", []):
            prices = (row["prompt_million_tokens"], row["generated_million_tokens"])
            rows.append((model["label"], str(row["batch_size"]), *(f"{figure(p)} {row['currency']}" for p in prices)))
    settings = report["settings"]
    note = f"At {settings['price_per_hour']} {settings['currency']} an hour and the measured throughput, never idle."
    return Table("Cost", ("model", "batch", "a million prompt tokens", "a million generated tokens"), tuple(rows), note)


def summary(report: Mapping[str, Any]) -> str:
    """One sentence on the first model beside its baseline, of what was measured; empty without a baseline."""
    model, baseline = others(report)[0], baseline_of(report)
    parts = []
    if baseline is None:
        return ""
    if model.get("divergence"):
        row = model["divergence"][0]
        parts.append(f"agrees with its base on {percent(row['top1_agreement'])} of the next tokens")
        parts.append(f"has {times(row['perplexity_ratio'])} its perplexity")
    elif model.get("perplexity") and baseline.get("perplexity"):
        value = model["perplexity"][0]["perplexity"] / baseline["perplexity"][0]["perplexity"]
        parts.append(f"has {times(value)} the perplexity of its base")
    for what, of in (("of its bytes on disk", disk), ("of its memory", resident)):
        share = ratio(model, baseline, of)
        if share is not None:
            parts.append(f"takes {percent(share)} {what}")
    if model.get("latency"):
        row = model["latency"][0]
        parts.append(f"generates {times(row['decode_speedup'])} as fast at batch {row['batch_size']}")
    if not parts:
        return ""
    bits = f"At {figure(model['bits_per_weight'])} bits a weight " if model["bits_per_weight"] is not None else ""
    return f"{bits}{model['label']} {', '.join(parts[:-1])}{' and ' * (len(parts) > 1)}{parts[-1]}."
