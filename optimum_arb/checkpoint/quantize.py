"""Binarizing a model from disk to disk, a decoder layer at a time, so that it can be interrupted."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..calibration.distributed import current_ranks
from ..calibration.memory import bounded_memory
from ..calibration.progress import Progress
from ..config import ARBConfig
from ..hub.upload import visible_files
from ..inspection import inspect_model, skeleton
from ..modules import select_modules
from ..output_files import name_full_disk
from ..report import ModelReport, ModuleReport, model_report
from ..reproduce import model_facts
from ..saving import check_named, check_not_source, check_output_directory, write_model
from .assemble import check_shard_size
from .finished import processor_of, write_finished
from .interrupt import interruptible
from .publish import publish, publish_again
from .run import StreamedRun, work_directory
from .source import NotStreamable, skeleton_class
from .work import WorkDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A model that was binarized from disk to disk.

    Attributes:
        path: its directory.
        report: what was binarized, how well, in how many bits.
        config: what it was binarized with, as its config.json says it.
        seconds: what it took, without the part of an interrupted run.
        resumed_layers: layers that an interrupted run had finished.
        files: what was written into the directory; where a run had ended there before, what is in it and not hidden.
    """

    path: Path
    report: ModelReport
    config: ARBConfig
    seconds: float
    resumed_layers: int
    files: tuple[str, ...]


def quantize_checkpoint(
    model: str | os.PathLike,
    output: str | os.PathLike,
    config: ARBConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    activations_on_disk: bool | str | os.PathLike = False,
    max_shard_size: int | str | None = None,
    model_class: type[PreTrainedModel] | None = None,
    processor: Any = None,
    progress: Progress | None = None,
) -> QuantizedCheckpoint:
    """Binarizes a model on disk and saves it packed, with one decoder layer in memory at a time.

    The result is a directory for `from_pretrained`, with the same bits as `from_pretrained(model,
    quantization_config=config)` and `save_pretrained` give. Beside it, in `.NAME.partial` (in a mount point: in it, as
    `.optimum_arb.partial`), is what an unfinished run has done: each finished layer is written there as a whole, and
    `resume=True` goes on behind the last one. The output directory is touched when everything is done.

    Inside `optimum_arb.calibration.distributed.distributed`, all ranks call this and divide the work; the first one
    writes the model, and each keeps what it has done in a directory of its own, `.NAME.partial-1` and so on.

    A model whose layers do not form a chain is binarized with all its weights in memory; a warning says so.

    Args:
        model: directory or Hub name of the float model.
        output: the directory to save it in.
        config: the choices; `ARBConfig()` unless given.
        resume: go on with an interrupted run of the same model, choices, machine and versions. Without one there,
            begin.
        overwrite: replace a model that lies in `output`. It stays there until the new one is whole.
        device: where layers run and are binarized: "cpu", "cuda", "auto".
        dtype: the dtype of the float model; "auto" is the checkpoint's own.
        activations_on_disk: keep the calibration's hidden states in files: True in the work directory, or a directory
            on a fast disk. Costs as many bytes written per layer as there are hidden states; a resumed run then need
            not run the finished layers again.
        max_shard_size: size of a safetensors file, as `save_pretrained` takes it.
        model_class: the class of the model; that of its config.json unless given.
        processor: tokenizer or processor to save with it; what lies with the model unless given.
        progress: is told of layers and linears; a bar or lines on stderr unless given.

    Raises:
        FileExistsError: `output` holds a model, or an interrupted run is there and `resume` is False.
        RuntimeError: another process is binarizing into `output`.
        ValueError: what `from_pretrained` raises; or the interrupted run cannot be continued, with what differs; or
            `output` is empty, or the directory of `model`.
        KeyboardInterrupt: on Ctrl-C and SIGTERM; its message says how to go on.
    """
    began = time.perf_counter()
    check_named(output)
    check_not_source(output, model)
    output = Path(output)
    name = os.fspath(model)
    config = ARBConfig() if config is None else config
    if max_shard_size is not None:
        check_shard_size(max_shard_size)
    ranks = current_ranks()
    work = WorkDirectory(work_directory(output, ranks.rank))
    if work.exists and not resume:
        work.lock()  # a run that is still at work there is not one to be deleted
        work.unlock()
        raise FileExistsError(
            f"An interrupted run has left its finished layers in {work.path}. Go on with it by resume=True "
            "(--resume), or delete that directory to begin anew."
        )
    staging = work.path / "model"
    run: StreamedRun | None = None
    if resume:
        before = _finished_before(work, staging, output, name, config, overwrite) if ranks.is_first else None
        if done := ranks.exchange(before, "looking for a finished model")[0]:
            if not ranks.is_first:
                work.clear()
            return done
    check_output_directory(output, overwrite)
    try:
        model_config = AutoConfig.from_pretrained(name)
        if getattr(model_config, "quantization_config", None) is not None:
            raise ValueError(f"{name} is already quantized: start from the float model.")
        model_class = model_class or saved_class(model_config)
        run = StreamedRun(work, resume, device, activations_on_disk, progress, dtype)
        with interruptible(run.how_to_go_on), bounded_memory():
            try:
                binarized = _binarize(model_class, name, config, dtype, run)
            except NotStreamable as error:
                logger.warning("%s cannot be read layer by layer: %s. It is binarized in memory.", name, error)
                run.close()
                work.clear()
                work.unlock()  # another process may begin there
                return _in_memory(
                    model_class, name, output, config, dtype, overwrite, device, max_shard_size, processor
                )
            assert run.weights is not None
            files: tuple[str, ...] = ()
            if ranks.is_first:
                digests = write_finished(binarized, run.weights, staging, output, name, max_shard_size, processor)
                work.publish(digests)
                publish(staging, output)
                files = tuple(digests)
            files = ranks.exchange(files, "writing the model")[0]  # until then, all that is needed to resume is kept
            run.close()
            run.remove_activations()
            work.clear()
        quantization: Any = binarized.config.quantization_config
        seconds = time.perf_counter() - began
        return QuantizedCheckpoint(output, model_report(binarized), quantization, seconds, run.resumed, files)
    except (
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:  # a full disk, too little memory: nothing is lost, but who knows that
        if run is not None and work.locked and (kept := run.what_is_kept()):
            logger.warning("An error ended the run: %s", kept)
        name_full_disk(error, work.path)
        raise
    finally:
        try:
            if run is not None:
                run.close()
        finally:  # also when it is interrupted: in a notebook this process would be the one that is waited for
            if not work.pieces and work.locked:
                work.clear()
            work.unlock()


def _binarize(
    model_class: type[PreTrainedModel], name: str, config: ARBConfig, dtype: str | torch.dtype, run: StreamedRun
) -> PreTrainedModel:
    return skeleton_class(model_class, run.loading).from_pretrained(name, quantization_config=config, dtype=dtype)


def saved_class(config: Any) -> type[PreTrainedModel]:
    """The class of a model's config.json, if it is transformers' own; else what `AutoModelForCausalLM` takes."""
    architecture = config.architectures[0] if config.architectures else ""
    found = getattr(transformers, architecture, None)
    if found is None:
        found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if found is None or isinstance(found, (list, tuple)):
        raise ValueError(
            f"The architecture {architecture!r} is none of transformers' own: load the model with its own class and "
            "quantization_config=ARBConfig(...), and save it."
        )
    return found


def _in_memory(
    model_class: type[PreTrainedModel],
    name: str,
    output: Path,
    config: ARBConfig,
    dtype: str | torch.dtype,
    overwrite: bool,
    device: str | torch.device,
    max_shard_size: int | str | None,
    processor: Any,
) -> QuantizedCheckpoint:
    began = time.perf_counter()
    model = model_class.from_pretrained(name, quantization_config=config, dtype=dtype, device_map=str(device))
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    ranks = current_ranks()
    files: tuple[str, ...] = ()
    if ranks.is_first:
        processor = processor_of(name) if processor is None else processor
        files = tuple(sorted(write_model(model, processor, output, overwrite, **options)))
    files = ranks.exchange(files, "writing the model")[0]
    quantization: Any = model.config.quantization_config
    return QuantizedCheckpoint(output, model_report(model), quantization, time.perf_counter() - began, 0, files)


def _finished_before(
    work: WorkDirectory, staging: Path, output: Path, name: str, config: ARBConfig, overwrite: bool
) -> QuantizedCheckpoint | None:
    """The model of a run that was interrupted when its model was whole, or that was not interrupted at all."""
    if not work.exists and overwrite:
        return None  # the model there may be the one to replace: of a run that was killed before it kept anything
    files: list[str] | None = None
    if work.exists:
        work.read()
        if work.published is None:
            return None
        files = sorted(work.published)
        work.lock()
        try:
            if not _is_that(staging if _quantization(staging) else output, output, name, config):
                raise ValueError(
                    f"The interrupted run in {work.path} finished a model with other choices than these, or of another "
                    "float model. Delete that directory to begin anew."
                )
            publish_again(work, staging, output)
            work.clear()
        finally:
            work.unlock()
    if not _is_that(output, output, name, config):
        return None
    logger.warning("%s holds the finished model already: there is nothing to resume.", output)
    found = inspect_model(output)
    modules = tuple(
        ModuleReport(m.name, m.method, m.layout, math.prod(m.shape), m.bits_per_weight, m.stored_bytes, None, None)
        for m in found.modules
    )
    if found.report is not None:  # the errors, as the run that ended has measured them
        measured = {module.name: module for module in found.report}
        modules = tuple(measured[module.name] for module in modules)
    files = visible_files(output) if files is None else files  # of a run that ended, nothing says which it wrote
    packed = sum(module.stored_bytes for module in modules)
    report = ModelReport(modules, found.kept, found.bits_per_weight, packed, found.stored_bytes)
    return QuantizedCheckpoint(output, report, found.config, 0.0, 0, tuple(files))


def _is_that(directory: Path, output: Path, name: str, config: ARBConfig) -> bool:
    """Whether a directory holds the model that a run would make: of these choices, linears and float weights.

    Args:
        directory: to look at.
        output: of the run. Where it is the float model's own directory, that one is gone.
        name: of the float model.
        config: the choices.
    """
    stored = _quantization(directory)
    if stored is None or ARBConfig.from_dict(stored).choices() != config.choices():
        return False
    if os.path.realpath(name) == os.path.realpath(output):
        return True
    found = inspect_model(directory)
    selection = select_modules(skeleton(AutoConfig.from_pretrained(name)), config, strict=False)
    models = (found.reproduce or {}).get("models") or {}
    fingerprints = (models.get("base") or {}).get("fingerprint"), model_facts(name).get("fingerprint")
    same_weights = None in fingerprints or fingerprints[0] == fingerprints[1]
    return same_weights and set(selection.convert) == {module.name for module in found.modules}


def _quantization(directory: Path) -> dict[str, Any] | None:
    """The quantization_config of a binarized model's directory, None where there is none."""
    path = directory / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return stored if isinstance(stored, dict) and stored.get("quant_method") == "arb" else None
