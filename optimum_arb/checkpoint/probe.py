"""How fast this machine binarizes: a few seconds of the real code on random weights of the model's shapes."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from ..algorithms.hessian import prepare_hessian
from ..calibration.correction import Corrections
from ..calibration.data import TOKENS_PER_BATCH
from ..calibration.reading import Step
from ..calibration.reuse import LARGEST
from ..calibration.statistics import InputStatistics
from ..config import ARBConfig
from ..conversion import binarize_linear
from ..nn import ARBFactorizedLinear, ARBLinear

FORWARD_SHARE = 0.4  # of the probe's time, where there is calibration
VOCABULARY = 256
# What error correction adds to a layer's runs, one in float and one binarized, where the inputs of down_proj are not
# kept (`calibration/reuse.py`): gate_proj and up_proj once more, which are .44 of the weights of a layer of Llama-2-7B.
CORRECTED_RUNS = 0.44


@dataclass
class Probe:
    """What was measured and what follows.

    Attributes:
        seconds: estimated for the whole run; None where a layer of the model could not be run by itself.
        fit_seconds: of it, for the fits.
        forward_seconds: of it, for the calibration's forward passes and its statistics.
        probe_seconds: what the probe took.
        threads: CPU threads.
        assumptions: what was extrapolated.
    """

    seconds: float | None
    fit_seconds: float
    forward_seconds: float | None
    probe_seconds: float
    threads: int
    assumptions: list[str] = field(default_factory=list)


# rows, columns, configuration, and how many there are of each linear
Shapes = list[tuple[int, int, ARBConfig, int]]


def probe(
    model_config: Any,
    names: list[str],
    shapes: Shapes,
    tokens: tuple[int, int],
    device: str,
    budget: float,
    correction: float = 0.0,
) -> Probe:
    """Measures one linear of each width and one layer of the model, and adds up.

    Args:
        model_config: of the model.
        names: of the linears.
        shapes: their rows, columns and configurations, and of experts, how many there are.
        tokens: calibration sequences and their length; (0, 0) without calibration.
        device: "cpu" or "cuda".
        budget: seconds; no new measurement that would exceed it is begun.
        correction: strength of error correction.
    """
    start = time.perf_counter()
    assumptions: list[str] = []
    forward: float | None = 0.0
    if tokens[0]:
        share = budget * FORWARD_SHARE
        forward = _forward_seconds(model_config, names, shapes, tokens, device, share, assumptions, correction > 0)
    left = budget - (time.perf_counter() - start)
    fit = _fit_seconds(shapes, bool(tokens[0]), device, left, assumptions, correction)
    return Probe(
        seconds=None if forward is None else fit + forward,
        fit_seconds=fit,
        forward_seconds=forward,
        probe_seconds=time.perf_counter() - start,
        threads=torch.get_num_threads(),
        assumptions=assumptions,
    )


def _timed(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _fit_seconds(
    shapes: Shapes, calibrated: bool, device: str, budget: float, assumptions: list[str], correction: float
) -> float:
    """The fits of all linears: for each width and configuration, `seconds = fixed + slope * rows`, measured."""
    groups: dict[tuple[int, str], list[int]] = {}
    configs: dict[str, ARBConfig] = {}
    for rows, columns, config, copies in shapes:
        key = json.dumps(config.choices(), sort_keys=True, default=str)
        configs[key] = config
        groups.setdefault((columns, key), []).extend([rows] * copies)
    _fit(64, 128, configs[next(iter(configs))], calibrated, device, correction)  # the first call is slower
    total = 0.0
    left = len(groups)
    # small ones first: what they leave over is for the large ones
    for (columns, key), counts in sorted(groups.items()):
        start = time.perf_counter()
        share = budget / left
        fixed, slope, exact = _fit_line(columns, max(counts), configs[key], calibrated, device, share, correction)
        budget -= time.perf_counter() - start
        left -= 1
        total += sum(fixed + slope * count for count in counts)
        if not exact:
            assumptions.append(f"the time of linears with {columns} columns is extrapolated from fewer rows or columns")
    return total


def _fit_line(
    columns: int, rows: int, config: ARBConfig, calibrated: bool, device: str, budget: float, correction: float
) -> tuple[float, float, bool]:
    """(fixed seconds, seconds a row, whether the full width was measured at two numbers of rows)."""
    start = time.perf_counter()

    def affordable(seconds: float) -> bool:
        return time.perf_counter() - start + seconds < budget

    width = min(columns, 512)
    few = min(rows, 128)
    spent, prepared = _fit(few, width, config, calibrated, device, correction)
    # of the cost, the factorization grows with the cube of the columns, the products with their square
    while width < columns and affordable(8 * spent):
        width = min(columns, 2 * width)
        spent, prepared = _fit(few, width, config, calibrated, device, correction)
    many, more = few, spent
    while many < rows and affordable((more - prepared) * min(rows / many, 4) + prepared):
        many = min(rows, 4 * many)
        more, _ = _fit(many, width, config, calibrated, device, correction)
    growth = columns / width
    if many > few:
        slope = max(more - spent, 0.0) / (many - few)
        fixed = max(more - slope * many, 0.0)
    else:
        slope = max(spent - prepared, 0.0) / few
        fixed = prepared
    return fixed * growth**3, slope * growth, width == columns and (many > few or many == rows)


def _fit(
    rows: int, columns: int, config: ARBConfig, calibrated: bool, device: str, correction: float
) -> tuple[float, float]:
    """Seconds to binarize a random linear, and of them the seconds to factorize its calibration matrix; both with what
    error correction adds."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = nn.Parameter(torch.randn(rows, columns, generator=generator).to(device) * 0.02)
    hessian = None
    prepared = corrected = 0.0
    if calibrated:
        # energies that fall by orders of magnitude, as those of real activations do
        inputs = torch.randn(256, columns, generator=generator) * torch.logspace(0, -2, columns)
        hessian = (inputs.T @ inputs + torch.diag(torch.logspace(1, -1, columns))).to(device)
        damping, order = config.resolved_damp_percent, config.resolved_act_order
        inverse = not config.resolved_admm_iterations
        prepared = _timed(lambda: prepare_hessian(hessian, damping, order, inverse=inverse), device)
        if correction:
            sums = Corrections(Step(["probe"]), {"probe": module}, torch.device(device))
            for total in sums.sums.values():
                total.copy_(torch.randn(total.shape, generator=generator))
            corrected = _timed(lambda: sums.solve(["probe"], hessian, correction), device)
            corrected += _timed(lambda: sums.corrected("probe"), device)
    spent = _timed(lambda: binarize_linear("probe", module, config, hessian, 256), device)
    return spent + corrected, prepared + corrected


def _forward_seconds(
    model_config: Any,
    names: list[str],
    shapes: Shapes,
    tokens: tuple[int, int],
    device: str,
    budget: float,
    assumptions: list[str],
    corrected: bool,
) -> float | None:
    """The passes of the calibration: each layer once in float with its statistics, once binarized; with error
    correction, `CORRECTED_RUNS` more of it, and sums as large as the statistics."""
    start = time.perf_counter()
    try:
        model, layers = _one_layer(model_config, device)
    except (ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        assumptions.append(f"no time: a layer of the model could not be made by itself ({error})")
        return None
    known = dict(zip(names, shapes, strict=True))
    linears = {name: module for name, module in model.named_modules() if name in known}
    if any(copies > 1 for *_, copies in shapes):
        assumptions.append("experts run the calibration as fast as in float, and their statistics cost nothing")
    if not linears:
        assumptions.append("no time: the first layer of the model has no linear that is binarized")
        return None
    length = tokens[1]
    batch = max(1, TOKENS_PER_BATCH // length)

    def run(samples: int, size: int, statistics: bool) -> float:
        ids = torch.randint(VOCABULARY, (samples, size), generator=torch.Generator().manual_seed(0)).to(device)

        def call() -> None:
            with torch.no_grad():
                if not statistics:
                    model(input_ids=ids, use_cache=False)
                    return
                with InputStatistics(linears) as gathered:
                    model(input_ids=ids, use_cache=False)
                    gathered.end_batch()

        return _timed(call, device)

    # the longest run that fits: whole batches as the calibration has them, else shorter
    run(1, min(32, length), True)
    size, samples = min(64, length), 1
    first = run(samples, size, True)
    passes = 3 if corrected else 2
    half = budget / (passes + 1)  # of what is left, for each of the passes; the rest was for making the layer
    half = min(half, max(0.5, (budget - (time.perf_counter() - start)) / passes))
    scale = max(1.0, half / max(first, 1e-4) / 1.5)
    size = min(length, int(64 * scale)) if length > 64 else length
    samples = max(1, min(batch, tokens[0], int(64 * scale / size)))
    dense = run(samples, size, True) / (samples * size)
    if corrected:
        plain = run(samples, size, False) / (samples * size)
        widest = max(columns for _, columns, *_ in known.values())
        kept = device == "cpu" and tokens[0] * length * widest * 4 <= LARGEST
        dense += (0.0 if kept else CORRECTED_RUNS) * plain + max(dense - plain, 0.0)
    for name in list(linears):
        rows, columns, config, _ = known[name]
        model.set_submodule(name, _random_packed(rows, columns, config, device))
    packed = run(samples, size, False) / (samples * size)
    if size < length:
        assumptions.append(f"the time of the forward passes is extrapolated from sequences of {size} tokens")
    return (dense + packed) * tokens[0] * length * layers


def _one_layer(model_config: Any, device: str) -> tuple[nn.Module, int]:
    """The model with its first layer alone and a small vocabulary, random weights, float32; and how many it has."""
    config = copy.deepcopy(model_config)
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    text.vocab_size = VOCABULARY
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, key, None)
    model_class = getattr(transformers, (config.architectures or [""])[0])
    model = model_class._from_config(config, dtype=torch.float32).eval()
    return model.to(device), layers


def _random_packed(rows: int, columns: int, config: ARBConfig, device: str) -> ARBLinear:
    """A binarized linear of random bits."""
    if config.factorized:
        rank = config.resolved_rank(rows, columns)
        return _random_values(ARBFactorizedLinear(columns, rows, rank, bias=False)).to(device)
    layout = config.layout
    salient = math.ceil(columns / 16) if layout.salient else 0
    permuted = config.resolved_act_order
    layer = ARBLinear(columns, rows, layout, config.block_size, bias=False, permuted=permuted, salient=salient)
    return _random_values(layer).to(device)


def _random_values(layer: ARBLinear) -> ARBLinear:
    """Fills the packed tensors with random bits."""
    for name, tensor in layer.packed().items():
        if name == "permutation":
            tensor.copy_(torch.randperm(layer.in_features)[None])
        elif name == "salient_columns":
            count = tensor.shape[1]
            tensor.copy_(torch.arange(count)[None] * (layer.in_features // max(count, 1)))
        elif tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(256, tensor.shape))
        else:
            tensor.fill_(0.02)
    return layer
