"""A run that binarized a model, done again from what the model records of it, on another revision of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .calibration.data import BUNDLED, DOWNLOADED
from .config import RECORDED, ARBConfig
from .inspection import Inspection, inspect_model
from .report import ModelReport

# What of a stored configuration is no choice of the user's.
_NO_CHOICES = (*RECORDED, "format_version", "requires", "quant_method", "dataset", "backend")
ERRORS = ("weight_error", "output_error", "held_out_error")


@dataclass(frozen=True)
class Plan:
    """A run to be done again.

    Attributes:
        earlier: the model that the first run made.
        base: what to load, directory or Hub name.
        revision: of it; None is the newest.
        config: how to binarize it.
    """

    earlier: Inspection
    base: str
    revision: str | None
    config: ARBConfig


def plan_again(
    model: str | Path, base: str | None = None, revision: str | None = None, dataset: str | None = None
) -> Plan:
    """What to do, from the configuration of a binarized model.

    Args:
        model: directory or Hub name of the model that the earlier run made.
        base: the float model; None is the one that the model records.
        revision: of the base on the Hub; None is its newest.
        dataset: the calibration text; None is the recorded one, where its name alone says which.

    Raises:
        ValueError: what is recorded does not suffice; the message names the option that gives it.
        FileNotFoundError: there is no such model.
    """
    earlier = inspect_model(model)
    config = earlier.config
    recorded = config.base_model or {}
    if base is None:
        base = recorded.get("name")
        if base is None:
            raise ValueError(
                f"{model} does not record what it was made from (a directory without a name): give it with --base."
            )
    if Path(base).is_dir():
        if revision is not None:
            raise ValueError(f"--revision is of a model on the Hub, and the base {base} is a directory: leave it out.")
        name = recorded.get("name")
    else:
        name = base
    choices = {key: value for key, value in config.to_dict().items() if key not in _NO_CHOICES}
    choices["dataset"] = _dataset(model, config.calibration, dataset)
    return Plan(earlier, base, revision, ARBConfig(**choices, base_model={"name": name} if name else None))


def _dataset(model: str | Path, calibration: Mapping[str, Any] | None, given: str | None) -> str | None:
    """The calibration text."""
    if calibration is None:
        if given is not None:
            raise ValueError(f"{model} was binarized without calibration: --dataset does not repeat that run.")
        return None
    if given is not None:
        return given
    name = calibration.get("dataset")
    if name in BUNDLED or name in DOWNLOADED:
        return name
    what = "texts or tokens of the user's own" if name == "custom" else f"the file {name!r}"
    raise ValueError(
        f"{model} was calibrated on {what} ({calibration.get('samples')} sequences), of which it records only the "
        "fingerprint: give the text with --dataset."
    )


def changes(
    plan: Plan,
    report: ModelReport,
    config: ARBConfig,
    reproduce: Mapping[str, Any] | None,
    perplexity: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What differs between the earlier run and the one that repeated it.

    Args:
        plan: what was done.
        report: of the new model.
        config: of the new model, with what its run recorded.
        reproduce: of the new run.
        perplexity: of the new model, measured as the earlier one's; None without.

    Returns:
        Plain JSON values: of each, `before` and `after`: `base_revision`, `base_fingerprint`, `optimum_arb`,
        `calibration` (fingerprints), `bits_per_weight`, `packed_bytes`, `perplexity`, the means of the `ERRORS`,
        `broken` (names of modules that look so); and `modules`: name -> error -> before and after, the largest rise of
        the output error first. What is not known is None.
    """
    old = plan.earlier
    before = {module.name: module for module in old.report or []}
    after = {module.name: module for module in report.modules}
    modules = {
        name: {
            key: _pair(getattr(before.get(name), key, None), getattr(after.get(name), key, None))
            for key in (*ERRORS, "bits_per_weight")
        }
        for name in [*after, *(name for name in before if name not in after)]
    }
    return {
        "base": plan.base,
        "base_revision": _pair(
            (old.config.base_model or {}).get("revision"), (config.base_model or {}).get("revision")
        ),
        "base_fingerprint": _pair(_base_fingerprint(old.reproduce), _base_fingerprint(reproduce)),
        "optimum_arb": _pair(old.config.optimum_arb_version, config.optimum_arb_version),
        "calibration": _pair(
            (old.config.calibration or {}).get("fingerprint"), (config.calibration or {}).get("fingerprint")
        ),
        "bits_per_weight": _pair(old.bits_per_weight, report.bits_per_weight),
        "packed_bytes": _pair(sum(module.stored_bytes for module in old.modules), report.packed_bytes),
        "perplexity": _pair(
            old.config.perplexity["perplexity"] if old.config.perplexity else None,
            None if perplexity is None else perplexity["perplexity"],
        ),
        **{key: _pair(_mean(before.values(), key), _mean(after.values(), key)) for key in ERRORS},
        "broken": _pair(
            None if old.report is None else [warning.module for warning in old.warnings],
            [warning.module for warning in report.warnings],
        ),
        "modules": dict(sorted(modules.items(), key=lambda item: -_rise(item[1]["output_error"]))),
    }


def _pair(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before, "after": after}


def _base_fingerprint(reproduce: Mapping[str, Any] | None) -> str | None:
    facts = ((reproduce or {}).get("models") or {}).get("base")
    return facts.get("fingerprint") if isinstance(facts, dict) else None


def _mean(modules: Any, key: str) -> float | None:
    known = [getattr(module, key) for module in modules if getattr(module, key) is not None]
    return sum(known) / len(known) if known else None


def _rise(pair: Mapping[str, float | None]) -> float:
    before, after = pair["before"], pair["after"]
    return 0.0 if before is None or after is None else after - before
