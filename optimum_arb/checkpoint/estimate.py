"""What binarizing a model will take, from its configuration alone: true bits, bytes, memory, time.

Bits and bytes follow from the shapes. Memory is a sum of what the quantizer holds at its worst moment. Time comes from
a probe of this machine (`probe.py`): no weight of the model is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..calibration.data import calibration_batch_size
from ..config import ARBConfig
from ..format.packing import block_count
from ..inspection import skeleton
from ..modules import Selection, linear_shape, select_modules
from ..stored.checksums import placeholder
from .estimate_memory import streamed_memory
from .probe import Probe, probe

# Salient columns of a block where they are searched (1 to 49): SmolLM2-135M has 2.93 bits with ARB-RC as published,
# which is about 8 a block.
SEARCHED_SALIENT = 8
SALIENT_RANGE = (1, 49)


@dataclass
class Estimate:
    """What binarizing will take and give.

    Attributes:
        model: the model's name.
        method: the method.
        weights: number of weights that are binarized.
        modules: number of linears that are binarized.
        bits_per_weight: all stored bits of the binarized weights over their number.
        bits_range: the least and the most that it can be, where salient columns are searched; else None.
        packed_bytes: bytes of the binarized weights.
        float_bytes: bytes of everything that stays in float.
        file_bytes: bytes of the safetensors files.
        peak_ram_bytes: largest resident memory of the process.
        peak_gpu_bytes: largest memory of the GPU, where one is used; else None.
        calibration_tokens: tokens of the calibration.
        seconds: from the call to its end, waiting for the disk not counted; None without a probe.
        probe: what was measured; None without a probe.
        assumptions: what the figures rest on.
        kept: reason -> number of linears that stay in float.
    """

    model: str
    method: str
    weights: int
    modules: int
    bits_per_weight: float
    bits_range: tuple[float, float] | None
    packed_bytes: int
    float_bytes: int
    file_bytes: int
    peak_ram_bytes: int
    peak_gpu_bytes: int | None
    calibration_tokens: int
    seconds: float | None
    probe: Probe | None
    assumptions: list[str] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Shape:
    """A linear that will be binarized, or one part of the matrix of each expert of a layer.

    Attributes:
        name: of the module, or of the experts' parameter.
        rows, columns: out_features and in_features of one.
        config: its choices.
        copies: how many there are: 1, or experts times parts.
        experts: whether they are experts.
    """

    name: str
    rows: int
    columns: int
    config: ARBConfig
    copies: int = 1
    experts: bool = False

    @property
    def weights(self) -> int:
        return self.rows * self.columns * self.copies

    @property
    def scale_bits(self) -> int:
        return 16 if self.experts else self.config.resolved_scale_bits

    @property
    def parameter(self) -> str:
        """The name of the float tensor."""
        return self.name if self.experts else f"{self.name}.weight"

    def stored(self, salient_per_block: int) -> dict[str, tuple[int, int]]:
        config = self.config
        blocks = block_count(self.columns, config.block_size)
        width = self.columns if config.block_size == -1 else config.block_size
        chosen = config.resolved_salient_columns
        count = salient_per_block if chosen == "search" else int(chosen)
        widths = [min(width, self.columns - index * width) for index in range(blocks)]
        salient = sum(min(count, size - 1) for size in widths)
        return config.stored_shapes(self.rows, self.columns, config.resolved_act_order, salient)

    def bytes(self, salient_per_block: int) -> int:
        stored = self.stored(salient_per_block)
        return self.copies * sum(_nbytes(name, shape, self.columns, self.scale_bits) for name, shape in stored.items())


def _nbytes(name: str, shape: tuple[int, int], columns: int, scale_bits: int) -> int:
    """Bytes of a packed tensor: signs are bytes, scales float16 or codes with float32 grids, indices int16 up to 32768
    columns, else int32."""
    if name.endswith("weight") or name in ("inner", "input_signs"):
        return math.prod(shape)
    if name == "scale_grid":
        return math.prod(shape) * 4 if scale_bits == 8 else 0
    if name.endswith("scale"):
        return math.prod(shape) * scale_bits // 8
    return math.prod(shape) * (4 if columns > 2**15 else 2)


def estimate(
    name: str,
    config: ARBConfig,
    dtype: str = "auto",
    device: str = "cpu",
    budget: float | None = 20.0,
    activations_on_disk: bool = False,
) -> Estimate:
    """Estimates what `quantize_checkpoint` will take.

    Args:
        name: directory or Hub name; only `config.json` is read.
        config: the choices.
        dtype: the dtype in which the model would be loaded; "auto" is the checkpoint's own.
        device: where it would be binarized: "cpu" or "cuda".
        budget: seconds that the probe may take; None for no probe, and no time.
        activations_on_disk: whether the hidden states would be kept in files.

    Raises:
        ValueError: a model that cannot be binarized, or whose architecture is not transformers' own.
    """
    if config.target_bits_per_weight is not None:
        raise ValueError(
            f"target_bits_per_weight={config.target_bits_per_weight} chooses by the weights, which an estimate does "
            "not read. Estimate with method='arb-dbf' and as many factor_bits: it stores as much, in memory at once."
        )
    model_config = AutoConfig.from_pretrained(name)
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is already quantized: the estimate is for the float model.")
    model = skeleton(model_config)
    float_dtype = _dtype(dtype, model_config)
    selection = select_modules(model, config)
    linears = [_shape(model, selection, key, choices) for key, choices in selection.convert.items()]
    weights = sum(linear.weights for linear in linears)
    packed = sum(linear.bytes(SEARCHED_SALIENT) for linear in linears)
    searched = any(linear.config.resolved_salient_columns == "search" for linear in linears)
    bounds = [8 * sum(linear.bytes(count) for linear in linears) / weights for count in SALIENT_RANGE]
    remaining = _float_tensors(model, linears)
    float_bytes = sum(math.prod(shape) for shape in remaining.values()) * float_dtype.itemsize
    tokens = _calibration_tokens(model_config, config)
    assumptions = ["the scales fit into float16, as those of trained models do"]
    if searched:
        assumptions.append(
            f"searched salient columns: {SEARCHED_SALIENT} a block, as SmolLM2-135M has; the range is for 1 to 49"
        )
    corrected = tokens[0] > 0 and config.resolved_error_correction > 0
    batch_size = calibration_batch_size(config, tokens[0], max(tokens[1], 1), torch.device(device))
    held = model, linears, packed, float_dtype, tokens, batch_size, device, activations_on_disk, corrected
    ram, gpu = streamed_memory(*held)
    assumptions.append("the layers form a chain; otherwise all weights are in memory at once")
    if config.refine is not None:
        assumptions.append(f"neither the seconds nor the memory of refine={config.refine!r} are counted")
    measured = None
    if budget is not None:
        shapes = [(one.rows, one.columns, one.config, one.copies) for one in linears]
        strength = config.resolved_error_correction if corrected else 0.0
        measured = probe(model_config, [linear.name for linear in linears], shapes, tokens, device, budget, strength)
        assumptions += measured.assumptions
    if tokens[0]:
        assumptions.append(f"the calibration text has {tokens[0]} sequences of {tokens[1]} tokens")
    return Estimate(
        model=name,
        method=config.method,
        weights=weights,
        modules=len(linears),
        bits_per_weight=8 * packed / weights,
        bits_range=(bounds[0], bounds[1]) if searched else None,
        packed_bytes=packed,
        float_bytes=float_bytes,
        file_bytes=packed + float_bytes + _header_bytes(linears, remaining, float_dtype, config),
        peak_ram_bytes=ram,
        peak_gpu_bytes=gpu,
        calibration_tokens=tokens[0] * tokens[1],
        seconds=None if measured is None else measured.seconds,
        probe=measured,
        assumptions=assumptions,
        kept=dict(Counter(selection.keep.values())),
    )


def _shape(model: PreTrainedModel, selection: Selection, name: str, config: ARBConfig) -> _Shape:
    matrix = selection.experts.get(name)
    if matrix is None:
        return _Shape(name, *linear_shape(model.get_submodule(name)), config)
    return _Shape(name, matrix.part_features, matrix.in_features, config, matrix.experts * matrix.parts, True)


def _dtype(name: str, model_config: Any) -> torch.dtype:
    if name == "auto":
        found = getattr(model_config, "dtype", None) or torch.float32
    else:
        found = getattr(torch, name, None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={name!r} is unknown: use auto, float32, bfloat16 or float16.")
    return found


def _float_tensors(model: PreTrainedModel, linears: list[_Shape]) -> dict[str, tuple[int, ...]]:
    """The tensors of the file that are not packed, tied ones once."""
    packed = {linear.parameter for linear in linears}
    persistent = set(model.state_dict(keep_vars=True))
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(t.shape) for name, t in tensors.items() if name not in packed and name not in tied}


def _header_bytes(
    linears: list[_Shape], remaining: dict[str, tuple[int, ...]], dtype: torch.dtype, config: ARBConfig
) -> int:
    """Bytes of the header of one safetensors file; several files have a little more."""
    header: dict[str, Any] = {}
    offset = 0

    def add(name: str, kind: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal offset
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size

    for name, shape in remaining.items():
        add(name, {4: "F32", 2: "F16"}.get(dtype.itemsize, "F64"), shape, math.prod(shape) * dtype.itemsize)
    for linear in linears:
        for key, shape in linear.stored(SEARCHED_SALIENT).items():
            name = linear.parameter + ("" if key == "weight" else f"_{key}")
            kind = "U8" if key.endswith("weight") else "F16"
            add(name, kind, shape, _nbytes(key, shape, linear.columns, linear.scale_bits) * linear.copies)
    header["__metadata__"] = {"format": "pt", **placeholder(len(header), config.to_dict())}
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8


def _calibration_tokens(model_config: Any, config: ARBConfig) -> tuple[int, int]:
    """(sequences, tokens of each)."""
    if config.dataset is None:
        return 0, 0
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return config.num_samples, min(config.sequence_length, positions or config.sequence_length)
