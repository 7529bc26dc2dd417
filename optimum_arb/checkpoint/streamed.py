"""The weights of a model that is binarized from disk to disk: a layer is in memory while it is at work."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

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
from .behind import Behind
from .digests import SourceDigests
from .disk_activations import DiskActivations
from .source import CheckpointSource, NotStreamable, read_header
from .work import WorkDirectory

logger = logging.getLogger(__name__)


class StreamedWeights(LayerWeights):
    """Reads layers from a checkpoint, and from the pieces of a work directory once they are finished.

    While a layer is at work, a thread reads the next one, for its checksum and into the page cache, and another one
    writes the one before. An error of writing is raised when the next layer is finished.

    Args:
        model: the skeleton, on the meta device.
        source: the checkpoint.
        work: where finished parts are kept.
        selection: what is binarized.
        records: name of a binarized module -> what is known of it; finished parts' are added.
        digests: of the checkpoint.
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
        digests: SourceDigests,
        activations: DiskActivations | None = None,
    ):
        self.model = model
        self.source = source
        self.work = work
        self.selection = selection
        self.records = records
        self._activations = activations
        self._digests = digests
        self._used: list[str] = []  # parts whose tensors something was made of
        self._behind = Behind()
        self._writing: str | None = None
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

    def wait(self) -> None:
        """Until what was finished is kept, or could not be."""
        self._behind.wait()

    def close(self) -> None:
        """As `wait`, and ends the thread that computes checksums."""
        try:
            self._behind.close()
        finally:
            self._digests.close()

    def changed_sources(self) -> list[str]:
        """The parts whose float tensors are not what the finished pieces were made of."""
        known = self.work.sources
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(known, pool.map(self.source.fingerprint, known), strict=True))
        return [part for part in known if found[part] != known[part]]

    # What the walk asks

    def is_finished(self, layer: str) -> bool:
        if layer == self._writing:
            self._settle()
        return layer in self.work.pieces

    def load(self, layer: str) -> None:
        if self.resident:
            return
        if self.is_finished(layer):
            self._load_piece(layer)
        else:
            self._note_source(layer)
            self._read_ahead(layer)
            self.source.load(layer)

    def release(self, layer: str) -> None:
        if not self.resident:
            self.source.release(layer)
            give_back_memory()
        if self._activations is not None and self._writing is None and layer in self.work.pieces:
            self._activations.drop_before(layer)  # it was run again: of 60 layers there would be 60 generations

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
        self._settle()

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
        if part not in self._used and part not in self.work.sources:
            self._used.append(part)
            self._digests.begin(part)

    def _read_ahead(self, layer: str) -> None:
        """Has the layer behind this one read, and the files as far as that."""
        layers = self.source.layers
        behind = layers.index(layer) + 1
        if behind < len(layers) and layers[behind] not in self.work.sources:
            self._digests.begin(layers[behind])
        self._digests.advance(behind / len(layers))

    def _write(self, part: str) -> None:
        """Has a part kept: a layer as a whole, of the rest what is binarized."""
        self._settle()
        names = self._binarized(part) if part == OUTSIDE else self.source.names(part)
        state = self.model.state_dict()
        tensors = {name: state[name] for name in names}
        records = {name: asdict(self.records[name]) for name in self._targets(part) if name in self.records}
        used = [one for one in self._used if one not in self.work.sources and self._is_past(one, part)]
        kept = None if self._activations is None else self._activations.state
        self._behind.do(partial(self._keep, part, tensors, records, used, kept))
        self._writing = part

    def _is_past(self, other: str, part: str) -> bool:
        """Whether something may have been made of another part by the time a part is written: a layer may be loaded
        before its turn."""
        layers = self.source.layers
        return OUTSIDE in (other, part) or layers.index(other) <= layers.index(part)

    def _keep(
        self,
        part: str,
        tensors: dict[str, torch.Tensor],
        records: dict[str, Any],
        used: list[str],
        kept: dict[str, Any] | None,
    ) -> None:
        """What `_write` leaves to a thread. The model is the walk's meanwhile, and so is everything of this object that
        changes."""
        sources = {name: self._digests.of(name) for name in used}
        if self._activations is None or kept is None:
            self.work.write_piece(part, tensors, records, sources)
            return
        self._activations.synchronize(kept)
        self.work.write_piece(part, tensors, records, sources, kept)
        self._activations.drop_stale(kept)

    def _settle(self) -> None:
        """Until the part that was written last is kept.

        Raises:
            OSError: it cannot be; and whatever else `WorkDirectory.write_piece` raises.
        """
        self._writing = None
        self._behind.settle()

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
