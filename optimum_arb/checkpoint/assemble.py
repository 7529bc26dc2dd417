"""The finished model's files out of its pieces, tensor by tensor: no more than a part of it is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..calibration.memory import give_back_memory
from ..calibration.weights import OUTSIDE
from .streamed import StreamedWeights

# As `save_pretrained` has it.
MAX_SHARD_SIZE = "50GB"


class _Shard:
    """A safetensors file that is written out of order, as `safetensors` would write it."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]):
        self.path = path
        # the library says in which order it puts tensors, and how it calls their dtypes
        order = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata)
        header = json.loads(order[8 : 8 + int.from_bytes(order[:8], "little")])
        self.places: dict[str, int] = {}
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                size = tensors[name].numel() * tensors[name].element_size()
                entry["shape"] = list(tensors[name].shape)
                entry["data_offsets"] = [end, end + size]
                self.places[name] = end
                end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._file.seek(self._start + self.places[name])
        self._file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]

    def close(self) -> None:
        self._file.close()


def check_shard_size(size: int | str) -> None:
    """To be asked before the work begins.

    Raises:
        ValueError: no size of a file that `save_pretrained` takes.
    """
    number: object = size
    if isinstance(size, str) and (found := re.fullmatch(r"\s*(\d+(\.\d*)?|\.\d+)\s*[TGMK]B\s*", size, re.IGNORECASE)):
        number = float(found[1])
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        raise ValueError(f"max_shard_size={size!r} is no size of a file: give one such as '5GB' or '500MB'.")


def assemble(
    model: PreTrainedModel,
    weights: StreamedWeights,
    directory: Path,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes the safetensors files, their index, and the configurations of a model whose parts are all finished.

    The files are those that `save_pretrained` would write of the model in memory. They may not be on the disk yet.

    Args:
        model: the skeleton, with its binarized modules in place.
        weights: its finished parts.
        directory: to write into; it is there and empty.
        max_shard_size: as `save_pretrained` takes it.
    """
    quantizer: Any = model.hf_quantizer
    metadata = {**quantizer.get_state_dict_and_metadata(model)[1], "format": "pt"}
    with weights.outside():
        pass  # what the checkpoint holds twice and alike is tied from here on
    empty = _as_saved(model, {name: tensor.to("meta") for name, tensor in model.state_dict().items()})
    split = split_torch_state_dict_into_shards(
        empty,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE if max_shard_size is None else max_shard_size,
    )
    shards: dict[str, _Shard] = {}
    try:
        for file, names in split.filename_to_tensors.items():
            shards[file] = _Shard(directory / file, {name: empty[name] for name in names}, metadata)
        written: set[str] = set()
        for part in (OUTSIDE, *weights.source.layers):
            for name, tensor in _part(model, weights, part).items():
                expected = empty[name]
                assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
                shards[split.tensor_to_filename[name]].write(name, tensor)
                written.add(name)
                del tensor
            give_back_memory()
        if unwritten := set(empty) - written:
            raise RuntimeError(f"{min(unwritten)} is in no part of the model.")
    finally:
        for shard in shards.values():
            shard.close()
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.config.dtype = str(model.dtype).split(".")[1]  # type: ignore[assignment]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def _as_saved(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the names of the checkpoint, without what is tied or not to be saved."""
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return revert_weight_conversion(model, state)


def _part(model: PreTrainedModel, weights: StreamedWeights, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part under the names of the checkpoint."""
    if part != OUTSIDE:
        with safe_open(weights.work.piece(part), framework="pt") as file:
            return revert_weight_conversion(model, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    with weights.outside():
        state = model.state_dict()
        return _as_saved(model, {name: state[name] for name in weights.source.names(part)})
