"""A model's float checkpoint on disk, of which any part can be loaded and let go of again.

transformers loads: its own `from_pretrained` finds the files, makes the skeleton and the renamings, and each part is
loaded by the function that would load all of it. What it gives is the same to the bit, and lies at the same addresses
of the mapped files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.utils import logging

from ..calibration.weights import OUTSIDE
from ..stored.keys import KeyMap

_CHUNK = 1 << 24


class NotStreamable(ValueError):
    """Why a checkpoint cannot be read part by part."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, and the first byte and the one behind the last."""

    file: str
    start: int
    stop: int


class CheckpointSource:
    """The tensors of a checkpoint, divided among the layers of a model and the rest of it.

    Args:
        model: the skeleton: every parameter on the meta device.
        files: the safetensors files of the checkpoint.
        load_config: what transformers would load the whole of it with.
        layers: names of the layers.

    Raises:
        NotStreamable: the files are not safetensors, a tensor becomes a part of two layers, or one is missing.
    """

    def __init__(self, model: PreTrainedModel, files: Sequence[str], load_config: Any, layers: Iterable[str]):
        self.model = model
        self.layers = list(layers)
        self._layers = set(self.layers)
        self._load_config = load_config
        self._begun = False
        self._places = tensor_places(files)
        self._expected = set(model.state_dict())
        names = KeyMap(model, load_config.weight_mapping or [])
        self._targets: dict[str, list[str]] = {}
        self._keys: dict[str, list[str]] = {part: [] for part in (OUTSIDE, *self.layers)}
        stored: set[str] = set()
        for key in self._places:
            found = [name for name in names.names(key) if name in self._expected]
            parts = {self.part_of(name) for name in found}
            if len(parts) > 1:
                raise NotStreamable(f"the tensor {key!r} becomes a part of several layers")
            for part in parts:
                self._keys[part].append(key)
            self._targets[key] = found
            stored.update(found)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        tied |= set((getattr(model, "all_tied_weights_keys", None) or {}).values())
        self.missing = self._expected - stored
        if absent := sorted(self.missing - tied):
            raise NotStreamable(f"the checkpoint lacks {absent[0]!r}, which transformers initializes at random")
        self._load({})  # leaves on the model which conversions the keys took, for saving
        self._begun = True
        self._tie()

    def part_of(self, name: str) -> str:
        """The layer that a parameter or module belongs to, or `OUTSIDE`."""
        while name := name.rpartition(".")[0]:
            if name in self._layers:  # all tensors of 80 layers in 2 ms, several times a layer; by comparing in 13
                return name
        return OUTSIDE

    def names(self, part: str) -> list[str]:
        """The parameters and persistent buffers of a part, in the model's order; those that it has now."""
        return [name for name in self.model.state_dict() if self.part_of(name) == part]

    def load(self, part: str, leave_out: Collection[str] = ()) -> None:
        """Loads a part of the model from the files, on the CPU.

        Args:
            part: a layer's name, or `OUTSIDE`.
            leave_out: names of parameters that are not loaded.

        Raises:
            ValueError: a tensor is not what the model expects.
        """
        skip = set(leave_out)
        wanted = [key for key in self._keys[part] if not skip & set(self._targets[key])]
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            tensors = {}
            for key in wanted:
                path = self._places[key].file
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensors[key] = files[path].get_slice(key)
            info = self._load(tensors)
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys)[0]
            raise ValueError(
                f"{name}: it is {list(found)} in the checkpoint and {list(expected)} in the model. They do not belong "
                "together."
            )
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise ValueError(f"{name} could not be loaded: {error}")
        if part == OUTSIDE:
            self._tie()

    def release(self, part: str) -> None:
        """Lets go of what was loaded of a part: its parameters are on the meta device again."""
        empty: dict[int, nn.Parameter] = {}
        for name in self.names(part):
            owner, _, key = name.rpartition(".")
            module = self.model.get_submodule(owner)
            parameter = module._parameters.get(key)
            if parameter is None:
                buffer = module._buffers[key]
                assert buffer is not None
                module._buffers[key] = torch.empty_like(buffer, device="meta")
                continue
            if id(parameter) not in empty:  # tied parameters stay one
                data = torch.empty_like(parameter, device="meta")
                empty[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module.register_parameter(key, empty[id(parameter)])

    def state(self, part: str) -> list[tuple[Any, ...]]:
        """Changes when a file of a part's tensors is replaced or written."""
        files = sorted({self._places[key].file for key in self._keys[part]})
        found = [(file, os.stat(file)) for file in files]
        return [(file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in found]

    def fingerprint(self, part: str, check: Callable[[], None] = lambda: None) -> str:
        """SHA-256 of the names and bytes of a part's tensors in the files.

        Args:
            part: a layer's name, or `OUTSIDE`.
            check: is called all along, and may raise.
        """
        digest = hashlib.sha256()
        for key in sorted(self._keys[part]):
            place = self._places[key]
            digest.update(f"{key}\0{place.stop - place.start}\0".encode())
            for chunk in read_range(place.file, place.start, place.stop):
                check()
                digest.update(chunk)
        return digest.hexdigest()

    def _tie(self) -> None:
        self.model.tie_weights(missing_keys=set(self.missing), recompute_mapping=False)

    def _load(self, tensors: dict[str, Any]) -> Any:
        conversions = self.model.__dict__.get("_weight_conversions")
        with _without_bar():  # of which there would be one for every layer
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._load_config)
        if self._begun:  # and not those that the keys of one part took
            self.model._weight_conversions = conversions  # type: ignore[assignment]
        return info


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tensor_places(files: Sequence[str]) -> dict[str, _Place]:
    """Where each tensor of a checkpoint lies.

    Raises:
        NotStreamable: a file is not safetensors.
        ValueError: a tensor is in two files.
    """
    places: dict[str, _Place] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise NotStreamable(f"{Path(path).name} is no safetensors file")
        header, start = read_header(path)
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if key in places:
                raise ValueError(f"The tensor {key!r} is in {path} and in another file of the checkpoint too.")
            first, last = entry["data_offsets"]
            places[key] = _Place(str(path), start + first, start + last)
    return places


def read_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    with safe_open(path, framework="pt"):  # it checks the file
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def read_range(path: str | Path, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a file from `start` to before `stop`, a piece at a time."""
    buffer = memoryview(bytearray(min(_CHUNK, max(stop - start, 1))))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = stop - start
        while left:
            count = file.readinto(buffer[:left])
            if not count:
                raise ValueError(f"{path} was cut short while it was read.")
            yield buffer[:count]
            left -= count


def skeleton_class(model_class: type[PreTrainedModel], loaded: Callable[[list[str], Any], None]) -> Any:
    """A class whose `from_pretrained` does everything but load weights.

    The model that it makes is of `model_class`, its parameters are on the meta device, and its buffers that are in no
    checkpoint (rotary frequencies) are computed.

    Args:
        model_class: of the model.
        loaded: is called in place of loading, with the files and what transformers would load them with.
    """

    def nothing_loaded(
        model: PreTrainedModel, state_dict: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any
    ):
        loaded([str(file) for file in files or ()], load_config)
        with _without_bar():
            return convert_and_load_state_dict_in_model(model, {}, load_config)

    def nothing_to_finish(model: PreTrainedModel, load_config: Any, info: Any) -> Any:
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # so that only the buffers which are in no checkpoint are computed
        model._move_missing_keys_from_meta_to_device(
            set(),  # type: ignore[arg-type]
            load_config.device_map,
            load_config.device_mesh,
            load_config.hf_quantizer,
        )
        model._initialize_missing_keys(load_config.is_quantized)
        model.__class__ = model_class
        info.missing_keys.clear()
        return info

    members = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
        "_load_pretrained_model": staticmethod(nothing_loaded),
        "_finalize_model_loading": staticmethod(nothing_to_finish),
    }
    return type(model_class.__name__, (model_class,), members)
