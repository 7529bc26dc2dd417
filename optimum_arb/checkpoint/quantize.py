"""Binarizing a model from disk to disk, a decoder layer at a time, so that it can be interrupted."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from ..calibration.distributed import current_ranks
from ..calibration.layers import find_layers
from ..calibration.progress import Progress
from ..config import ARBConfig
from ..hub.card import NAME as CARD
from ..hub.card import is_users_own
from ..hub.methods import finish_saved
from ..inspection import inspect_model
from ..placement import calibration_device
from ..quantizer import ARBHfQuantizer
from ..report import ModelReport, ModuleReport, model_report
from ..saving import check_output_directory, save_model
from ..version import __version__
from .assemble import assemble
from .disk_activations import DiskActivations, remove_activations
from .interrupt import interruptible
from .memory import bounded_memory
from .publish import publish
from .source import CheckpointSource, NotStreamable, skeleton_class
from .streamed import StreamedWeights
from .work import WorkDirectory, file_digest

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
        files: what was written into the directory.
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
    quantization_config=config)` and `save_pretrained` give. Beside it, in `.NAME.partial`, is what an unfinished run
    has done: each finished layer is written there as a whole, and `resume=True` goes on behind the last one. The output
    directory is touched when everything is done.

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
        ValueError: what `from_pretrained` raises; or the interrupted run cannot be continued, with what differs.
        KeyboardInterrupt: on Ctrl-C and SIGTERM; its message says how to go on.
    """
    began = time.perf_counter()
    output = Path(output)
    name = os.fspath(model)
    config = ARBConfig() if config is None else config
    ranks = current_ranks()
    work = WorkDirectory(work_directory(output, ranks.rank))
    if work.exists and not resume:
        raise FileExistsError(
            f"An interrupted run has left its finished layers in {work.path}. Go on with it by resume=True "
            "(--resume), or delete that directory to begin anew."
        )
    staging = work.path / "model"
    if resume:
        before = _finished_before(work, staging, output, config) if ranks.is_first else None
        if done := ranks.exchange(before, "looking for a finished model")[0]:
            if not ranks.is_first:
                work.clear()
            return done
    check_output_directory(output, overwrite)
    try:
        model_config = AutoConfig.from_pretrained(name)
        if getattr(model_config, "quantization_config", None) is not None:
            raise ValueError(f"{name} is already quantized: start from the float model.")
        model_class = model_class or _model_class(model_config)
        run = _Run(work, resume, device, activations_on_disk, progress, dtype)
        with interruptible(run.how_to_go_on), bounded_memory():
            try:
                binarized = _binarize(model_class, name, config, dtype, run)
            except NotStreamable as error:
                logger.warning("%s cannot be read layer by layer: %s. It is binarized in memory.", name, error)
                work.clear()
                return _in_memory(
                    model_class, name, output, config, dtype, overwrite, device, max_shard_size, processor
                )
            assert run.weights is not None
            files: tuple[str, ...] = ()
            if ranks.is_first:
                _write_model(binarized, run.weights, staging, output, name, max_shard_size, processor)
                found = (file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file())
                files = tuple(sorted(found))
                work.publish({file: file_digest(staging / file) for file in files})
                publish(work, staging, output)
            files = ranks.exchange(files, "writing the model")[0]  # until then, all that is needed to resume is kept
            run.weights.close()
            run.remove_activations()
            work.clear()
        quantization: Any = binarized.config.quantization_config
        seconds = time.perf_counter() - began
        return QuantizedCheckpoint(output, model_report(binarized), quantization, seconds, run.resumed, files)
    finally:
        if not work.pieces and work.locked:
            work.clear()
        work.unlock()


def work_directory(output: str | os.PathLike, rank: int = 0) -> Path:
    """Where an unfinished run into `output` keeps what it has done: each of several ranks in a place of its own."""
    path = Path(output).absolute()
    return path.parent / (f".{path.name}.partial-{rank}" if rank else f".{path.name}.partial")


class _Run:
    """What the quantizer asks while it binarizes: `optimum_arb.quantizer.Stream`."""

    def __init__(
        self,
        work: WorkDirectory,
        resume: bool,
        device: str | torch.device,
        activations_on_disk: bool | str | os.PathLike,
        progress: Progress | None,
        dtype: str | torch.dtype,
    ):
        self.work = work
        self.resume = resume
        self.device = _device(device)
        self.progress = progress
        self.weights: StreamedWeights | None = None
        self.resumed = 0
        self.layers: list[str] = []
        self._dtype = str(dtype).removeprefix("torch.")
        self._files: list[str] = []
        self._load_config: Any = None
        self._activations: DiskActivations | None = None
        self._directory: Path | None = None
        if activations_on_disk is True:
            self._directory = work.path / "activations"
        elif activations_on_disk:
            self._directory = Path(os.fspath(activations_on_disk)) / work.path.name.removeprefix(".")

    def loading(self, files: list[str], load_config: Any) -> None:
        """In place of loading the weights."""
        self._files, self._load_config = files, load_config
        load_config.hf_quantizer.stream = self

    @contextmanager
    def opened(
        self, model: PreTrainedModel, quantizer: ARBHfQuantizer, calibration: dict[str, Any] | None
    ) -> Iterator[dict[str, Any]]:
        """As `optimum_arb.quantizer.Stream` says."""
        if quantizer.quantization_config.refine == "model":
            raise NotStreamable("refine='model' tunes all of its layers at once")
        if quantizer.quantization_config.target_bits_per_weight is not None:
            raise NotStreamable("target_bits_per_weight looks at the gradients of all of its layers at once")
        self.layers = [layer for group in find_layers(model, quantizer.selection.modules()) for layer in group.names]
        source = CheckpointSource(model, self._files, self._load_config, self.layers)
        identity = self._identity(model, quantizer, calibration)
        self.work.lock()
        if self.resume and self.work.exists:
            self.work.resume(identity)
        else:
            self.work.begin(identity)
        # of several ranks, one may have been killed before it kept the layer that another one kept last
        finished = current_ranks().exchange(list(self.work.pieces), "comparing what is finished")
        self.work.keep(set(finished[0]).intersection(*finished))
        self.resumed = sum(layer in self.work.pieces for layer in self.layers)
        if self._directory is not None:
            self._activations = DiskActivations(self._directory, self.work.activations)
        self.weights = StreamedWeights(
            model, source, self.work, quantizer.selection, quantizer.records, self._activations
        )
        if changed := self.weights.changed_sources():
            raise ValueError(
                f"The interrupted run in {self.work.path} cannot be continued: the float weights of "
                f"{changed[0] or 'the embeddings or the head'} are not those that it began with. Go back to the model "
                "that it was, or delete that directory and begin anew."
            )
        options: dict[str, Any] = {"weights": self.weights, "activations": self._activations, "device": self.device}
        yield {**options, "progress": self.progress}
        self.weights.finish_all()

    def how_to_go_on(self) -> str:
        """What to tell a user who interrupts the run."""
        done = sum(layer in self.work.pieces for layer in self.layers)
        if not done:
            return "interrupted before a layer was finished"
        return (
            f"interrupted: {done} of {len(self.layers)} layers are finished and kept in {self.work.path}. The same "
            "call with resume=True (--resume) goes on from there."
        )

    def remove_activations(self) -> None:
        if self._activations is not None:
            self._activations.clear()
            remove_activations(self._activations.directory)

    def _identity(
        self, model: PreTrainedModel, quantizer: ARBHfQuantizer, calibration: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Everything that the bits of the result depend on, but for the weights: those are compared part by part."""
        config = quantizer.quantization_config
        own = model.config.to_dict()
        for key in ("quantization_config", "transformers_version", "_name_or_path", "name_or_path"):
            own.pop(key, None)
        ranks = current_ranks()
        return {
            **({"ranks": f"{ranks.rank} of {ranks.size}"} if ranks.size > 1 else {}),
            "config": {**config.choices(), "modules_to_not_convert": config.modules_to_not_convert},
            "calibration": calibration,
            "model": {"class": type(model).__name__, "config": _json(own)},
            "dtype": self._dtype,
            "machine": {
                "device": str(self.device),
                "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
            },
            "versions": {
                "optimum_arb": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
        }


def _device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" and the other device maps of accelerate mean the accelerator, if there is one."""
    name = str(device)
    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        return calibration_device("auto", current_ranks())
    return calibration_device({"": int(name) if name.isdigit() else name}, current_ranks())


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_json(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _binarize(
    model_class: type[PreTrainedModel], name: str, config: ARBConfig, dtype: str | torch.dtype, run: _Run
) -> PreTrainedModel:
    return skeleton_class(model_class, run.loading).from_pretrained(name, quantization_config=config, dtype=dtype)


def _model_class(config: Any) -> type[PreTrainedModel]:
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


def _write_model(
    model: PreTrainedModel,
    weights: StreamedWeights,
    staging: Path,
    output: Path,
    name: str,
    max_shard_size: int | str | None,
    processor: Any,
) -> None:
    """Writes everything that goes into the output directory into another one."""
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    assemble(model, weights, staging, max_shard_size)
    processor = _processor(name) if processor is None else processor
    if processor is not None:
        processor.save_pretrained(staging)
    finish_saved(staging, model, output.absolute().name)
    if is_users_own(output / CARD):
        shutil.copy2(output / CARD, staging / CARD)


def _processor(name: str) -> Any:
    """What lies with a model to read its inputs with, or None."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

    def has(file: str) -> bool:
        return cached_file(name, file, **quietly) is not None

    if has("processor_config.json") or has("preprocessor_config.json"):
        return AutoProcessor.from_pretrained(name)
    if has("tokenizer_config.json") or has("tokenizer.json"):
        return AutoTokenizer.from_pretrained(name)
    return None


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
    if ranks.is_first:
        save_model(model, _processor(name) if processor is None else processor, output, overwrite, **options)
    ranks.exchange(None, "writing the model")
    quantization: Any = model.config.quantization_config
    files = tuple(sorted(file.name for file in output.iterdir() if file.is_file()))
    return QuantizedCheckpoint(output, model_report(model), quantization, time.perf_counter() - began, 0, files)


def _finished_before(work: WorkDirectory, staging: Path, output: Path, config: ARBConfig) -> QuantizedCheckpoint | None:
    """The model of a run that was interrupted when its model was whole, or that was not interrupted at all."""
    if work.exists:
        work.read()
        if work.published is None:
            return None
        work.lock()
        try:
            before = ARBConfig.from_dict(_quantization(staging) or _quantization(output) or {})
            if before.choices() != config.choices():
                raise ValueError(
                    f"The interrupted run in {work.path} finished a model with other choices than these. Delete that "
                    "directory to begin anew."
                )
            publish(work, staging, output)
            work.clear()
        finally:
            work.unlock()
    stored = _quantization(output)
    if stored is None or ARBConfig.from_dict(stored).choices() != config.choices():
        return None
    logger.warning("%s holds the finished model already: there is nothing to resume.", output)
    found = inspect_model(output)
    modules = tuple(
        ModuleReport(m.name, m.method, m.layout, math.prod(m.shape), m.bits_per_weight, m.stored_bytes, None, None)
        for m in found.modules
    )
    packed = sum(module.stored_bytes for module in modules)
    report = ModelReport(modules, found.kept, found.bits_per_weight, packed, found.stored_bytes)
    files = tuple(sorted(file.name for file in output.iterdir() if file.is_file()))
    return QuantizedCheckpoint(output, report, found.config, 0.0, 0, files)


def _quantization(directory: Path) -> dict[str, Any] | None:
    """The quantization_config of a binarized model's directory, None where there is none."""
    path = directory / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return stored if isinstance(stored, dict) and stored.get("quant_method") == "arb" else None
