"""Bounds that a model must keep before it is released, read from a TOML file; only what they need is measured."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .report_tables import baseline_of, disk, others, peak, ratio, resident
from .settings import Settings

# What a `[measure]` table may say: the fields of `Settings` that are no consequence of the bounds; "text" as on the
# command line.
MEASURE_KEYS = tuple(
    "text" if field.name == "texts" else field.name
    for field in fields(Settings)
    if field.name not in ("parts", "tasks", "prompts", "sample_tokens", "chat", "price_per_hour", "currency")
)


@dataclass(frozen=True)
class Threshold:
    """A bound that can be set.

    Attributes:
        part: what of an evaluation it needs; None for what is known without loading the model.
        baseline: whether it needs the baseline.
        value: the measured figure out of an evaluation; None where there is none.
        what: of the figure, in words.
    """

    part: str | None
    baseline: bool
    value: Callable[[Mapping[str, Any]], float | None]
    what: str


@dataclass(frozen=True)
class Check:
    """A bound and what was measured.

    Attributes:
        name: the threshold's.
        limit: of the file.
        measured: None where it could not be measured, which fails.
        passed: whether it holds.
        excess: by how much the limit is missed, over the limit; negative where it is kept; None without a figure.
        what: the figure in words.
    """

    name: str
    limit: float
    measured: float | None
    passed: bool
    excess: float | None
    what: str


@dataclass(frozen=True)
class Thresholds:
    """What the file says.

    Attributes:
        limits: name -> limit; of tasks "tasks.TASK.METRIC".
        settings: how to measure, with the parts that the limits need.
        needs_baseline: whether one of them is a ratio to the baseline.
    """

    limits: dict[str, float]
    settings: Settings
    needs_baseline: bool


def _model(report: Mapping[str, Any]) -> dict[str, Any]:
    return others(report)[0]


def _rows(part: str, key: str, worst: Callable[..., float]) -> Callable[[Mapping[str, Any]], float | None]:
    """The worst over texts or batch sizes."""

    def value(report: Mapping[str, Any]) -> float | None:
        found = [row[key] for row in _model(report).get(part, [])]
        return worst(found) if found else None

    return value


def _share(of: Callable[[Mapping[str, Any]], float | None]) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda report: ratio(_model(report), baseline_of(report), of)


def _joules(model: Mapping[str, Any]) -> float | None:
    return model.get("energy", {}).get("joules_per_token")


def _worst_error(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(report: Mapping[str, Any]) -> float | None:
        errors = [module[key] for module in _model(report).get("modules", []) if module[key] is not None]
        return None if not errors else max(math.inf if math.isnan(error) else error for error in errors)

    return value


def _true_bits(report: Mapping[str, Any]) -> float | None:
    """None of a model that is not binarized, whether or not another threshold had it loaded and its dtype known."""
    model = _model(report)
    return model["bits_per_weight"] if model["method"] is not None else None


def _broken(report: Mapping[str, Any]) -> float | None:
    return len(_model(report)["warnings"]) if "warnings" in _model(report) else None


THRESHOLDS: dict[str, Threshold] = {
    "max_perplexity": Threshold("perplexity", False, _rows("perplexity", "perplexity", max), "perplexity"),
    "max_perplexity_ratio": Threshold(
        "divergence", True, _rows("divergence", "perplexity_ratio", max), "perplexity over the baseline's"
    ),
    "max_kl_divergence": Threshold(
        "divergence", True, _rows("divergence", "kl_divergence", max), "mean KL divergence in nats"
    ),
    "min_top1_agreement": Threshold(
        "divergence", True, _rows("divergence", "top1_agreement", min), "share of equal next tokens"
    ),
    "max_bits_per_weight": Threshold(None, False, _true_bits, "true bits per weight"),
    "max_file_bytes": Threshold(None, False, lambda r: disk(_model(r)), "bytes of the weights' files"),
    "max_file_bytes_ratio": Threshold(None, True, _share(disk), "bytes of the files over the baseline's"),
    "max_output_error": Threshold(None, False, _worst_error("output_error"), "largest output error of a layer"),
    "max_held_out_error": Threshold(None, False, _worst_error("held_out_error"), "largest held-out error of a layer"),
    "max_broken_layers": Threshold(None, False, _broken, "layers that look broken"),
    "max_resident_memory_bytes": Threshold("memory", False, lambda r: resident(_model(r)), "resident bytes"),
    "max_resident_memory_ratio": Threshold("memory", True, _share(resident), "resident bytes over the baseline's"),
    "max_peak_memory_bytes": Threshold("memory", False, lambda r: peak(_model(r)), "bytes at the peak"),
    "max_peak_memory_ratio": Threshold("memory", True, _share(peak), "bytes at the peak over the baseline's"),
    "min_tokens_per_second": Threshold(
        "latency", False, _rows("latency", "decode_tokens_per_second", min), "generated tokens a second"
    ),
    "min_tokens_per_second_ratio": Threshold(
        "latency", True, _rows("latency", "decode_speedup", min), "generated tokens a second over the baseline's"
    ),
    "min_prompt_tokens_per_second": Threshold(
        "latency", False, _rows("latency", "prefill_tokens_per_second", min), "prompt tokens a second"
    ),
    "min_prompt_tokens_per_second_ratio": Threshold(
        "latency", True, _rows("latency", "prefill_speedup", min), "prompt tokens a second over the baseline's"
    ),
    "max_first_token_seconds": Threshold(
        "latency", False, _rows("latency", "prefill_seconds", max), "seconds to the first token"
    ),
    "max_joules_per_token": Threshold("energy", False, lambda r: _joules(_model(r)), "joules of a token"),
    "max_joules_per_token_ratio": Threshold("energy", True, _share(_joules), "joules of a token over the baseline's"),
}


def read_thresholds(path: str | Path) -> Thresholds:
    """Reads the file: bounds at its top level, `[measure]` with how to measure, `[tasks]` with least metrics.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no TOML, an unknown key, a bound that is no number, or no bound at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of thresholds {path}.")
    content = _parse(path)
    measure, tasks = content.pop("measure", {}), content.pop("tasks", {})
    for name, table in (("measure", measure), ("tasks", tasks)):
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} must be a table: [{name}].")
    limits = {}
    for key, value in content.items():
        _known(path, key, (*THRESHOLDS, "measure", "tasks"))
        limits[key] = _number(path, key, value)
    for task, metrics in tasks.items():
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError(f"{path}: tasks.{task} must name a metric and its least value: {task}.acc = 0.5")
        for metric, value in metrics.items():
            limits[f"tasks.{task}.{metric}"] = _number(path, f"tasks.{task}.{metric}", value)
    if not limits:
        raise ValueError(f"{path} sets no threshold: {', '.join(THRESHOLDS)}.")
    needed = [THRESHOLDS[key] for key in limits if key in THRESHOLDS]
    parts = {threshold.part for threshold in needed if threshold.part} | ({"tasks"} if tasks else set())
    settings = Settings(**{**_measure(path, measure), "parts": tuple(sorted(parts)), "tasks": tuple(tasks)})
    return Thresholds(limits, settings, any(threshold.baseline for threshold in needed))


def check(thresholds: Thresholds, report: Mapping[str, Any]) -> list[Check]:
    """Holds an evaluation of one model against the bounds, in the order of the file.

    Args:
        thresholds: see `read_thresholds`.
        report: what `evaluation.evaluate` returned with their settings.
    """
    return [_check(name, limit, report) for name, limit in thresholds.limits.items()]


def _check(name: str, limit: float, report: Mapping[str, Any]) -> Check:
    if name in THRESHOLDS:
        measured, what = THRESHOLDS[name].value(report), THRESHOLDS[name].what
    else:
        _, task, metric = name.split(".", 2)
        metrics = _model(report).get("tasks", {}).get(task, {})
        measured = next((value for key, value in metrics.items() if key.partition(",")[0] == metric), None)
        what = f"{metric} of {task}"
    if measured is None:
        return Check(name, limit, None, False, None, f"{what}: {_why_missing(name, report)}")
    low = name.startswith(("min_", "tasks."))
    # what is not a number keeps no bound
    passed = measured >= limit if low else measured <= limit
    missed = limit - measured if low else measured - limit
    return Check(name, limit, measured, passed, missed / abs(limit) if limit else missed, what)


def _why_missing(name: str, report: Mapping[str, Any]) -> str:
    """Why there is no figure."""
    model = _model(report)
    if name.startswith("max_joules"):
        return "not available: " + "; ".join(model.get("energy", {}).get("missing", []))
    if name == "max_bits_per_weight":
        return "the model is not binarized by optimum_arb"
    if name in ("max_output_error", "max_held_out_error", "max_broken_layers"):
        return "not recorded: no arb_report.json with it lies beside the model"
    if name.startswith("tasks."):
        known = {key.partition(",")[0] for metrics in model.get("tasks", {}).values() for key in metrics}
        return f"not measured; the metrics are {', '.join(sorted(known))}"
    return "not measured"


def _parse(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}.") from None


def _known(path: Path, key: str, keys: tuple[str, ...]) -> None:
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1)
        raise ValueError(
            f"{path}: unknown key {key!r}" + (f"; is {near[0]!r} meant?" if near else f". Known: {', '.join(keys)}.")
        )


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{path}: {key} = {value!r} must be a number.")
    return float(value)


def _measure(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The table as arguments of `Settings`."""
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(Settings)}
    found = {}
    for key, value in table.items():
        _known(path, key, MEASURE_KEYS)
        field = "texts" if key == "text" else key
        default = defaults[field]
        if isinstance(default, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
            if not value or any(type(item) is not type(default[0]) for item in value):
                raise ValueError(f"{path}: measure.{key} must be a list of {_kind(type(default[0]))}.")
        elif default is not None and type(value) is not type(default):
            if not (type(default) is float and type(value) is int):
                raise ValueError(f"{path}: measure.{key} = {value!r} must be {_kind(type(default))}.")
        elif default is None and key in ("context_length", "max_windows", "limit") and type(value) is not int:
            raise ValueError(f"{path}: measure.{key} = {value!r} must be a whole number.")
        elif default is None and key in ("include_path", "backend") and type(value) is not str:
            raise ValueError(f"{path}: measure.{key} = {value!r} must be a text.")
        found[field] = value
    return found


def _kind(kind: type) -> str:
    return {int: "whole numbers", str: "texts", bool: "true or false", float: "a number"}[kind]
