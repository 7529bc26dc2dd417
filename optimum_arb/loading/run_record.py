"""What a model's configuration records of the run that binarized it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..calibration.data import calibration_record
from ..hub.base_model import base_model_facts
from ..modules import Selection, resolved_skips
from ..report import model_report
from ..reproduce import model_facts, reproduce_block
from ..version import __version__
from .calibrated import Task


def record_run(
    model: PreTrainedModel, task: Task, kept: dict[str, str], directory: Path | None = None
) -> dict[str, Any]:
    """Writes into the task's configuration what was done, and on what.

    Args:
        model: binarized.
        task: what was done.
        kept: name of what stayed in float -> the reason.
        directory: where the files of the float model lie; None where the model's name tells it.

    Returns:
        What it takes to repeat the run, see `optimum_arb.reproduce.reproduce_block`.

    Raises:
        ValueError: nothing was binarized.
    """
    config, records = task.config, task.records
    if not records:
        raise ValueError("Nothing was binarized: the checkpoint holds none of the weights that were selected.")
    config.bits_per_weight = model_report(model).bits_per_weight
    config.optimum_arb_version = __version__
    source = model.config
    commit = getattr(source, "_commit_hash", None)
    config.base_model = base_model_facts(source.name_or_path, commit, config.base_model)
    converted = {name: c for name, c in task.selection.convert.items() if name in records}
    done = Selection(converted, kept, task.selection.experts)
    config.modules_to_not_convert = resolved_skips(done) or None
    config.calibration = None
    if task.tokens is not None:
        unreached = sorted(name for name, record in records.items() if not record.tokens)
        config.calibration = {**calibration_record(config, task.tokens), "unreached": unreached}
        gains = {name: r.hadamard_gain for name, r in records.items() if r.hadamard_gain is not None}
        if gains:
            config.calibration["untransformed"] = sorted(name for name, gain in gains.items() if gain <= 1)
        config.calibration["error_correction"] = task.error_correction
        if task.refinement is not None:
            config.calibration["refinement"] = task.refinement
        config.dataset = config.calibration["dataset"]
    digest = None if task.stream is None else task.stream.digest
    facts = model_facts(source.name_or_path, commit, directory, digest) if source.name_or_path else {}
    if facts and Path(facts["name"]).is_dir():
        facts["name"] = Path(facts["name"]).name  # a path of this machine says nothing to others
    return reproduce_block({"base": facts} if facts else None, None, config.seed, whole_paths=False)
