"""`arb_report.json`: the report of the run that binarized a model, written beside it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..conversion import Record
from ..layer_warnings import layer_warnings
from ..report import ModelReport, ModuleReport, model_report

logger = logging.getLogger(__name__)

NAME = "arb_report.json"
SCHEMA = 1
# What of a module's entry is known only to the run that binarized it.
MEASURED = ("weight_error", "output_error", "tokens", "held_out_error", "held_out_tokens", "starved")


def report_dict(report: ModelReport, calibration: dict | None, reproduce: dict | None) -> dict[str, Any]:
    """The content of the file.

    Args:
        report: of the model.
        calibration: what its configuration records of the calibration.
        reproduce: see `optimum_arb.reproduce.reproduce_block`, of the run that binarized it.
    """
    return {
        "schema": SCHEMA,
        **report.to_dict(),
        "warnings": [asdict(warning) for warning in layer_warnings(report.modules)],
        "calibration": calibration,
        "reproduce": reproduce,
    }


def write_report(directory: str | Path, model: PreTrainedModel) -> bool:
    """Writes the report of a binarized model that was just saved there.

    Where nothing is known of the model's errors (it was loaded binarized, without a report beside it), there is nothing
    to write, and a report that is there is of another model: it is removed.

    Returns:
        Whether it was written.
    """
    path = Path(directory) / NAME
    quantizer: Any = model.hf_quantizer
    report = model_report(model)
    if all(module.weight_error is None for module in report.modules):
        path.unlink(missing_ok=True)
        return False
    content = report_dict(report, quantizer.quantization_config.calibration, quantizer.reproduce)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return True


def find_report(name: str | Path) -> Path | None:
    """Where the report of a model lies, in its directory or on the Hub, from which it is then downloaded."""
    if Path(name).is_dir():
        path = Path(name) / NAME
        return path if path.is_file() else None
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(str(name), NAME, **quietly)
    return None if found is None else Path(found)


def read_report(path: str | Path) -> dict[str, Any] | None:
    """The content of a report; None where there is none, or none that this version reads (which is logged).

    Args:
        path: the file, or the directory of a model.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["schema"] == SCHEMA and all(_is_entry(module) for module in content["modules"])
        known = known and isinstance(content["reproduce"], (dict, type(None)))
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        logger.warning("%s is damaged, or of another version: the errors of the layers are not known.", path)
        return None
    return content


def _is_entry(module: dict[str, Any]) -> bool:
    """Whether a module's entry is of the kinds of values that this package writes: a file is no program to trust."""
    errors = (module["weight_error"], module["output_error"], module["held_out_error"], module.get("hadamard_gain"))
    counts = (module["tokens"], module["held_out_tokens"], module["starved"], module["stored_bytes"])
    return (
        isinstance(module["name"], str)
        and all(error is None or type(error) in (int, float) for error in errors)
        and all(type(count) is int for count in counts)
    )


def restore_records(records: Mapping[str, Record], report: Mapping[str, Any]) -> dict[str, Record]:
    """The records of a model that is loaded binarized, with what the report beside it knows of the same modules.

    Args:
        records: name of a module -> what loading knows.
        report: see `read_report`. Entries of other methods are of another model and do not count.
    """
    entries = {entry["name"]: entry for entry in report["modules"]}
    found = dict(records)
    for name, record in records.items():
        entry = entries.get(name)
        if entry is not None and entry.get("method") == record.method:
            found[name] = replace(record, **{key: entry[key] for key in MEASURED if key in entry})
    return found


def matching_modules(report: Mapping[str, Any], stored: Mapping[str, tuple[str, int]]) -> list[ModuleReport] | None:
    """The modules of a report, if it is one of the model that is stored.

    Args:
        report: see `read_report`.
        stored: name -> layout and bytes of what lies on disk.

    Returns:
        None where a module is missing, or has another layout or size: the report is of another model.
    """
    names = ModuleReport.__dataclass_fields__
    try:
        modules = [ModuleReport(**{k: v for k, v in entry.items() if k in names}) for entry in report["modules"]]
    except TypeError:
        return None
    if {module.name: (module.layout, module.stored_bytes) for module in modules} != dict(stored):
        return None
    return modules
