"""The weights of a model that is binarized from disk to disk: a layer is in memory while it is at work."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..calibration.memory import give_back_memory
from ..calibration.weights import OUTSIDE, LayerWeights
from ..conversion import Record, empty_linear
from ..experts.packing import packed_form
from ..format.packing import TENSOR_NAMES
from ..modules import Selection, linear_shape
from ..nn import ARBExperts, ARBLinear
from ..stored.linears import StoredLinear, describe
from ..stored.tensors import StoredTensor
from .disk_activations import DiskActivations
from .source import CheckpointSource, NotStreamable, read_header
from .work import WorkDirectory

logger = logging.getLogger(__name__)


class StreamedWeights(LayerWeights):
    """Reads layers from a checkpoint, and from the pieces of a work directory once they are finished.

    Args:
        model: the skeleton, on the meta device.
        source: the checkpoint.
        work: where finished parts are kept.
        selection: what is binarized.
        records: name of a binarized module -> what is known of it; finished parts' are added.
        activations: the hidden states on disk, if they are.

    Raises:
        NotStreamable: a layer is itself to be binarized.
    """

    resident = False

    def __init__(
        self,
        model: PreTrainedModel,
        source: CheckpointSource,
        work: WorkDirectory,
        selection: Selection,
        records: dict[str, Record],
        activations: DiskActivations | None = None,
    ):
        self.model = model
        self.source = source
        self.work = work
        self.selection = selection
        self.records = records
        self._activations = activations
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checksum")
        self._digests: dict[str, Future[str]] = {}
        self._loaded = 0
        for name in selection.modules():
            if name in source.layers:
                raise NotStreamable(f"{name!r} is a linear and a layer at once")
        self._float: dict[str, nn.Module] = {}  # of finished layers, without weights
        for part, piece in work.pieces.items():
            if part != OUTSIDE:
                self._float[part] = copy.deepcopy(model.get_submodule(part))
            self._adopt(part)
            records.update({name: Record(**values) for name, values in piece["records"].items()})

    def close(self) -> None:
        """Ends the thread that computes checksums."""
        self._hasher.shutdown(wait=False, cancel_futures=True)

    def changed_sources(self) -> list[str]:
        """The parts whose float tensors are not what the finished pieces were made of."""
        known = self.work.sources
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(known, pool.map(self.source.fingerprint, known), strict=True))
        return [part for part in known if found[part] != known[part]]

    # What the walk asks

    def is_finished(self, layer: str) -> bool:
        return layer in self.work.pieces

    def load(self, layer: str) -> None:
        if self.resident:
            return
        if self.is_finished(layer):
            self._load_piece(layer)
        else:
            self._note_source(layer)
            self.source.load(layer)

    def release(self, layer: str) -> None:
        if not self.resident:
            self.source.release(layer)
            give_back_memory()

    def finish(self, layer: str) -> None:
        if self.resident:
            return  # `finish_all` writes what is in memory
        self._write(layer)
        if layer != OUTSIDE:
            self.release(layer)

    @contextmanager
    def in_float(self, layer: str, module: nn.Module) -> Iterator[nn.Module]:
        if layer not in self._float:
            yield module
            return
        self.model.set_submodule(layer, self._float[layer])
        try:
            self.source.load(layer)
            yield self._float[layer]
        finally:
            self.source.release(layer)
            self.model.set_submodule(layer, module)

    def stay(self, reason: str) -> None:
        if self.resident:
            return
        logger.warning(
            "%s: it is binarized with all of its weights in memory, and an interrupted run begins anew.",
            reason[:1].upper() + reason[1:],
        )
        if self.work.pieces:
            raise NotStreamable(reason)  # of a run with another version of this package: begin anew
        for part in (OUTSIDE, *self.source.layers):
            self._note_source(part)
            self.source.load(part)
        self.resident = True

    def finish_all(self) -> None:
        """Writes what the walk had no reason to finish by itself: everything, if all weights were in memory."""
        if self.resident:
            for part in (OUTSIDE, *self.source.layers):
                self._write(part)
                self.source.release(part)
            self.resident = False
        for layer in self.source.layers:
            if not self.is_finished(layer):  # of a list that holds nothing to binarize
                self.load(layer)
                self.finish(layer)

    @contextmanager
    def outside(self) -> Iterator[None]:
        with self.whole(()):
            yield

    @contextmanager
    def whole(self, layers: Iterable[str]) -> Iterator[None]:
        if self.resident:
            yield
            return
        with ExitStack() as stack:
            if not self._loaded:
                self._load_outside()
            self._loaded += 1
            stack.callback(self._leave_outside)
            for name in layers:
                module = self.model.get_submodule(name)

                def load(module, args, name=name):
                    self.load(name)

                def release(module, args, output, name=name):
                    self.release(name)

                stack.callback(module.register_forward_pre_hook(load).remove)
                stack.callback(module.register_forward_hook(release, always_call=True).remove)
            yield

    # Parts

    def _load_outside(self) -> None:
        self._note_source(OUTSIDE)
        if self.is_finished(OUTSIDE):
            self._load_piece(OUTSIDE)
        else:
            self.source.load(OUTSIDE)

    def _leave_outside(self) -> None:
        self._loaded -= 1
        if not self._loaded and not self.resident:
            self.release(OUTSIDE)

    def _note_source(self, part: str) -> None:
        if part not in self._digests and part not in self.work.sources:
            self._digests[part] = self._hasher.submit(self.source.fingerprint, part)

    def _write(self, part: str) -> None:
        """Keeps a part: a layer as a whole, of the rest what is binarized."""
        names = self._binarized(part) if part == OUTSIDE else self.source.names(part)
        state = self.model.state_dict()
        records = {name: asdict(self.records[name]) for name in self._targets(part) if name in self.records}
        sources = {part: digest.result() for part, digest in self._digests.items() if part not in self.work.sources}
        kept = None if self._activations is None else self._activations.state
        self.work.write_piece(part, {name: state[name] for name in names}, records, sources, kept)
        if self._activations is not None:
            self._activations.drop_stale()

    def _targets(self, part: str) -> list[str]:
        return [name for name in self.selection.convert if self.source.part_of(name) == part]

    def _binarized(self, part: str) -> list[str]:
        """The tensors of a part that its binarized modules hold in place of what the checkpoint has."""
        names: list[str] = []
        for name in dict.fromkeys(
            n.rpartition(".")[0] if n in self.selection.experts else n for n in self._targets(part)
        ):
            module = self.model.get_submodule(name)
            if isinstance(module, ARBExperts):
                names += [f"{name}.{key}" for key in module.packed_names()]
            elif isinstance(module, ARBLinear):
                names += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        return names

    def _adopt(self, part: str) -> None:
        """Puts binarized modules without weights in the places of a finished part's float ones."""
        header, _ = read_header(self.work.piece(part))
        headers = {k: StoredTensor(tuple(v["shape"]), v["dtype"]) for k, v in header.items() if k != "__metadata__"}
        for name in self._targets(part):
            config = self.selection.convert[name]
            if name in self.selection.experts:
                owner, _, key = name.rpartition(".")
                module = self.model.get_submodule(owner)
                layer = module if isinstance(module, ARBExperts) else ARBExperts(module, config.backend)
                names = {x: name if x == "weight" else f"{name}_{x}" for x in TENSOR_NAMES}
                with safe_open(self.work.piece(part), framework="pt") as file:
                    tensors = {x: file.get_tensor(k).to("meta") for x, k in names.items() if k in headers}
                layer.set_packed(key, packed_form(self.selection.experts[name], config), tensors)
                self.model.set_submodule(owner, layer)
            elif headers.get(f"{name}.weight", StoredTensor((), "")).dtype == "U8":
                linear = StoredLinear(name)
                for key, header_ in headers.items():
                    stem, _, last = key.rpartition(".")
                    if stem == name and last.startswith("weight"):
                        linear.tensors[last.removeprefix("weight_")] = header_
                module = self.model.get_submodule(name)
                packed = empty_linear(module, **describe(linear, config, *linear_shape(module)))
                packed.train(module.training)
                self.model.set_submodule(name, packed)

    def _load_piece(self, part: str) -> None:
        """A finished part. What is in float comes from the checkpoint where it was not changed: at the same addresses
        within the file as when the part was binarized, which the last bits of a product may depend on."""
        binarized = set(self._binarized(part))
        self.source.load(part, leave_out=binarized)
        with safe_open(self.work.piece(part), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                kept = file.get_tensor(name)
                owner, _, key = name.rpartition(".")
                module = self.model.get_submodule(owner)
                if key in module._buffers:
                    module._buffers[key] = kept.clone()
                    continue
                present = module.get_parameter(key)
                if name not in binarized and not present.is_meta and torch.equal(present, kept):
                    continue
                module.register_parameter(key, nn.Parameter(kept.clone(), requires_grad=present.requires_grad))
