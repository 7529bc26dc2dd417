"""The largest memory that binarizing from disk to disk takes, from a model's shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import psutil
import torch
from transformers import PreTrainedModel

from ..calibration.fitting import FITS, FITTED_WEIGHTS
from ..calibration.layers import find_layers
from ..calibration.memory import OWN_MAPPING
from ..calibration.reuse import KEPT_HIDDEN, LARGEST, LARGEST_ON_GPU
from ..config import ARBConfig
from .estimate_fit import fit_memory

# What the process takes beyond its packages as soon as it computes: thread pools, kernels, allocator. Of a Llama with
# hidden size 512, 377 MB were resident before the first layer and 400 after it, 358 before the run
# (benchmarks/streaming_memory.py).
RUNTIME = 42_000_000
# Matrices below `OWN_MAPPING` share the allocator's memory, which they leave in pieces: what a process takes for a fit,
# over the bytes of its tensors, with one thread and with more, of which each has a part of that memory to itself and
# leaves some `HEAP` of it unused. Peaks of one layer of a Llama, hidden size 512 and 1024.
IN_PIECES = (1.3, 1.5)
HEAP = 32_000_000
# Names of the linear at the end of an attention: its input is its own.
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense")


class Shape(Protocol):
    """A linear, or the matrices of experts, that will be binarized."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def config(self) -> ARBConfig: ...
    @property
    def experts(self) -> bool: ...


def streamed_memory(
    model: PreTrainedModel,
    linears: Sequence[Shape],
    packed: int,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    batch_size: int,
    device: str,
    activations_on_disk: bool = False,
    corrected: bool = False,
) -> tuple[int, int | None]:
    """Bytes of the largest resident memory of the process, and of the GPU (None without one).

    At its worst the quantizer holds one layer in float, the hidden states of all calibration tokens, the layer's
    calibration matrices and what the fits that run at once take (`fit_memory`), on a CPU as many as torch may use
    threads now, at most `FITS`, and the packed layer before, which is being written; or, at the end, what is in no
    layer. With error correction the hidden states are those of two models, there is beside them what is kept of a
    layer, and the matrices are those of one step of the layer, with the sum of what it corrects.

    Args:
        model: the skeleton.
        linears: what will be binarized.
        packed: bytes of all of it packed.
        dtype: of the float model.
        tokens: calibration sequences and their length; (0, 0) without calibration.
        batch_size: sequences that run through a layer together.
        device: where layers run.
        activations_on_disk: whether the hidden states are kept in files.
        corrected: whether there is error correction.
    """
    groups = find_layers(model, [one.name for one in linears])
    prefixes = {name: index for index, name in enumerate(name for group in groups for name in group.names)}
    sizes: Counter[int] = Counter()
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            sizes[_layer(name, prefixes)] += parameter.numel() * dtype.itemsize
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    twice = sum(parameter.numel() for name, parameter in model.named_parameters() if name in tied) * dtype.itemsize
    outside = sizes.pop(-1, 0) - twice
    layer = max(sizes.values(), default=0) + packed // max(1, len(prefixes))
    written = packed // len(prefixes) if len(prefixes) > 1 else 0  # in memory, also where layers run on a GPU
    base = psutil.Process().memory_info().rss + RUNTIME
    workspace = max(_fits(one, device, tokens[0] > 0) for one in _by_layer(linears, prefixes))
    if not tokens[0]:
        ram, on_device = 0, layer + workspace
    else:
        width = model.config.get_text_config().hidden_size
        batch = min(tokens[0], batch_size) * tokens[1]
        hidden = (batch if activations_on_disk else tokens[0] * tokens[1]) * width * dtype.itemsize
        widest = max(one.rows for one in linears)
        # a gated MLP holds gate, its activation, up and their product; beside them the residual and its like
        activations = 4 * batch * (widest + width) * dtype.itemsize
        if device == "cpu":
            activations *= min(torch.get_num_threads(), -(-tokens[0] // batch_size))
        statistics = _statistics(linears, prefixes)
        # the sums are of float64 while the layer runs, and of float32 when it is fitted
        if corrected:
            kept = 0 if activations_on_disk else _kept(linears, width, tokens[0] * tokens[1] * dtype.itemsize, device)
            ram = (1 if activations_on_disk else 2) * hidden + kept
            on_device = layer + _step(_by_step(linears, prefixes), activations, device)
            if not activations_on_disk and device != "cpu":
                on_device += _kept_on_device(linears, width, tokens[0] * tokens[1] * dtype.itemsize)
        else:
            ram, on_device = hidden, layer + max(2 * statistics + activations, statistics + workspace)
    if device == "cpu":
        return base + max(written + ram + on_device, outside), None
    return base + max(written + ram + layer, outside), on_device


def _kept(linears: Sequence[Shape], width: int, column: int, device: str) -> int:
    """Bytes of what is kept of a layer (`calibration/reuse.py`): in both of its forms what attention puts out, or the
    inputs of its last linear; and the inputs of the MLP's last linear where they are few, or fewer on a CPU.

    Args:
        linears: what will be binarized.
        width: hidden size.
        column: bytes of one number of each token.
        device: where layers run.
    """
    own = [one.columns for one in linears if not one.experts and one.name.rpartition(".")[2] in ATTENTION_OUTPUTS]
    attention = max([width, *(columns for columns in own if columns <= KEPT_HIDDEN * width)])
    widest = max((one.columns for one in linears if not one.experts), default=0)
    few = attention + widest <= KEPT_HIDDEN * width or (device == "cpu" and widest * column <= LARGEST)
    return column * (2 * attention + (widest if few else 0))


def _kept_on_device(linears: Sequence[Shape], width: int, column: int) -> int:
    """Bytes of the inputs of the MLP's last linear where a GPU keeps them; arguments as in `_kept`."""
    widest = max((one.columns for one in linears if not one.experts), default=0)
    return widest * column if KEPT_HIDDEN * width < width + widest and widest * column <= LARGEST_ON_GPU else 0


def _step(steps: Sequence[Sequence[Shape]], activations: int, device: str) -> int:
    """Bytes of a step with error correction: its matrix and the sums of what is corrected, in float64 while the layer
    runs and when they are divided by the matrix; then the fits. Experts have neither."""
    largest = 0
    for step in steps:
        fits = _fits(step, device, True)
        if not step[0].experts:
            square = step[0].columns ** 2
            # linears that share an input share a sum of [K, K] where theirs of [N, K] would not be smaller
            total = min(sum(one.rows for one in step), step[0].columns) * step[0].columns
            running = 8 * (square + total) + activations
            fits = max(running, 4 * square + 2 * 8 * (square + total), 4 * square + 8 * total + fits)
        largest = max(largest, fits)
    return largest


def _fits(linears: Sequence[Shape], device: str, calibrated: bool) -> int:
    """Bytes of the fits that run at once, of linears which are fitted together: the largest of them. Experts' are
    fitted one by one."""
    threads = torch.get_num_threads()
    sizes: list[int] = []
    alone = 0
    for one in linears:
        size = fit_memory(one.rows, one.columns, one.config, calibrated, torch.device(device))
        if device == "cpu" and 4 * max(one.rows, one.columns) * one.columns < OWN_MAPPING:
            size = int(size * IN_PIECES[threads > 1])
        if one.experts:
            alone = max(alone, size)
        else:
            sizes.append(size)
    if device == "cpu":
        count, heaps = min(FITS, threads), HEAP if threads > 1 else 0
    else:
        largest = max((one.rows * one.columns for one in linears if not one.experts), default=1)
        count, heaps = min(FITS, max(1, FITTED_WEIGHTS // largest)), 0
    return max(sum(sorted(sizes)[-count:]), alone) + heaps


def _by_layer(linears: Sequence[Shape], prefixes: dict[str, int]) -> list[list[Shape]]:
    """The linears and experts of each layer, and those that are in none."""
    layers: dict[int, list[Shape]] = {}
    for one in linears:
        layers.setdefault(_layer(one.name, prefixes), []).append(one)
    return list(layers.values())


def _by_step(linears: Sequence[Shape], prefixes: dict[str, int]) -> list[list[Shape]]:
    """Those that read one tensor: q, k and v do, and so do gate and up, the linears of a parent and of one width,
    but for the last one of an attention, whose input is its own. Experts are apart."""
    steps: dict[tuple, list[Shape]] = {}
    for one in linears:
        parent, _, last = one.name.rpartition(".")
        own = last if last in ATTENTION_OUTPUTS or one.experts else ""
        steps.setdefault((_layer(one.name, prefixes), parent, one.columns, own, one.experts), []).append(one)
    return list(steps.values())


def _layer(name: str, prefixes: dict[str, int]) -> int:
    parts = name.split(".")
    ends = (prefixes.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((index for index in ends if index is not None), -1)


def _statistics(linears: Sequence[Shape], prefixes: dict[str, int]) -> int:
    """Bytes of the calibration matrices of the layer that has most: those of experts are made one by one."""
    sums: Counter[int] = Counter()
    for step in _by_step(linears, prefixes):
        if not step[0].experts:
            sums[_layer(step[0].name, prefixes)] += 4 * step[0].columns ** 2
    return max(sums.values(), default=0)
