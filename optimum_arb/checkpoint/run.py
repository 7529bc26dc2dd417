"""`StreamedRun`: what a run from disk to disk has, keeps and goes on from."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import PreTrainedModel

from ..calibration.distributed import current_ranks
from ..calibration.layers import find_layers
from ..calibration.progress import Progress
from ..loading.calibrated import Task
from ..loading.placement import calibration_device
from ..publish import nothing_beside
from ..version import __version__
from .digests import SourceDigests
from .disk_activations import DiskActivations, remove_activations
from .source import CheckpointSource, NotStreamable
from .streamed import StreamedWeights
from .work import WorkDirectory


def work_directory(output: str | os.PathLike, rank: int = 0) -> Path:
    """Where an unfinished run into `output` keeps what it has done: each of several ranks in a place of its own.

    On the disk of `output`, wherever links lead: the model is renamed from here into its place.
    """
    path = Path(os.path.realpath(output))
    folder, name = (path, ".optimum_arb") if nothing_beside(path) else (path.parent, f".{path.name}")
    return folder / (f"{name}.partial-{rank}" if rank else f"{name}.partial")


class StreamedRun:
    """What is asked while a model is binarized: `optimum_arb.loading.calibrated.Stream`."""

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
        self._digests: SourceDigests | None = None
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
            # several runs may share the disk, into outputs of one name
            place = hashlib.sha256(os.fsencode(work.path)).hexdigest()[:8]
            self._directory = Path(os.fspath(activations_on_disk)) / f"{work.path.name.removeprefix('.')}-{place}"

    def loading(self, files: list[str], load_config: Any) -> None:
        """In place of loading the weights."""
        self._files, self._load_config = files, load_config
        load_config.hf_quantizer.stream = self

    @contextmanager
    def opened(
        self, model: PreTrainedModel, task: Task, calibration: dict[str, Any] | None
    ) -> Iterator[dict[str, Any]]:
        """As `optimum_arb.loading.calibrated.Stream` says."""
        # first: where the run of other choices cannot be streamed, what is finished here would be removed
        identity = self._identity(model, task, calibration)
        self.work.lock()
        if self.resume and self.work.exists:
            self.work.resume(identity)
        else:
            self.work.begin(identity)
        if task.config.refine == "model":
            raise NotStreamable("refine='model' tunes all of its layers at once")
        if task.config.target_bits_per_weight is not None:
            raise NotStreamable("target_bits_per_weight looks at the gradients of all of its layers at once")
        self.layers = [layer for group in find_layers(model, task.selection.modules()) for layer in group.names]
        source = CheckpointSource(model, self._files, self._load_config, self.layers)
        # of several ranks, one may have been killed before it kept the layer that another one kept last
        finished = current_ranks().exchange(list(self.work.pieces), "comparing what is finished")
        self.work.keep(set(finished[0]).intersection(*finished))
        self.resumed = sum(layer in self.work.pieces for layer in self.layers)
        if self._directory is not None:
            self._activations = DiskActivations(self._directory, self.work.activations)
        self._digests = SourceDigests(source, self._files)
        self.weights = StreamedWeights(
            model, source, self.work, task.selection, task.records, self._digests, self._activations
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

    def digest(self, file: Path) -> str:
        """As `optimum_arb.loading.calibrated.Stream` says."""
        assert self._digests is not None
        return self._digests.of_file(file)

    def close(self) -> None:
        """Ends the threads: what was finished is kept then, or could not be."""
        if self.weights is not None:
            self.weights.close()

    def how_to_go_on(self) -> str:
        """What to tell a user who interrupts the run."""
        kept = self.what_is_kept()
        return f"interrupted: {kept}" if kept else "interrupted before a layer was finished"

    def what_is_kept(self) -> str:
        """Where the finished layers are and how to go on, in a sentence; empty where there are none."""
        if self.weights is not None:
            self.weights.wait()
        done = sum(layer in self.work.pieces for layer in self.layers)
        if not done:
            return ""
        return (
            f"{done} of {len(self.layers)} layers are finished and kept in {self.work.path}. The same "
            "call with resume=True (--resume) goes on from there."
        )

    def remove_activations(self) -> None:
        if self._activations is not None:
            self._activations.clear()
            remove_activations(self._activations.directory)

    def _identity(self, model: PreTrainedModel, task: Task, calibration: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that the bits of the result depend on, but for the weights: those are compared part by part."""
        config = task.config
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
