"""Measures the kernels on this GPU and finds the fastest for each shape and number of tokens."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch

from ....format.layout import planes_layout
from ..packed import PackedWeight
from . import digits, half_bits, one_bit, prepack
from .available import has_digits_kernel, has_hopper_kernel, has_one_bit_kernel
from .gemm import gemm
from .gemm_config import GemmConfig, candidates, scaled_candidates
from .table import TOKENS, Entry
from .timing import copies_for, graph_time, random_weight

Shape = tuple[int, int, int]  # out_features, in_features, planes
Config = one_bit.DecodeConfig | half_bits.HalfConfig | GemmConfig


def one_bit_candidates(out_features: int, in_features: int) -> list[one_bit.DecodeConfig]:
    """Cuts of the one-bit kernel worth timing for a weight `[out_features, in_features]`."""
    found = []
    for groups in (1, 2):
        for warps in (4, 8, 16):
            programs = -(-out_features // (prepack.ROWS * groups))
            tiles = -(-in_features // prepack.SLOTS)
            if warps > max(4, tiles) or (groups > 1 and programs < 100):
                continue
            steps = -(-tiles // warps)
            # what is loaded ahead is spread evenly over the rounds: 8 and 4 of six steps are 6 and 3
            ahead = dict.fromkeys(-(-steps // -(-steps // count)) for count in (1, 2, 4, 8))
            found += [one_bit.DecodeConfig(groups, warps, count) for count in ahead]
    return found


def _calls(tokens: int, shape: Shape, permuted: bool) -> list[tuple[str, Config]]:
    out_features, in_features, planes = shape
    device = torch.device("cuda", torch.cuda.current_device())
    prepacked = has_one_bit_kernel(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    half: list[tuple[str, Config]] = []
    if prepacked and 2 < tokens <= half_bits.MAX_TOKENS:
        half += [("half_bits", c) for c in half_bits.candidates(out_features, in_features, tokens, processors)]
    if prepacked and tokens <= one_bit.MAX_TOKENS:
        return [*(("one_bit", c) for c in one_bit_candidates(out_features, in_features)), *half]
    hopper = has_hopper_kernel(device)
    stored = candidates(out_features, in_features, tokens, hopper, processors)
    if hopper:
        stored += scaled_candidates(out_features, in_features, tokens, planes, permuted, processors)
    if tokens <= digits.MAX_TOKENS and has_digits_kernel(device):
        stored += digits.candidates(out_features, in_features, tokens)
    return [*((c.kernel, c) for c in stored), *half]


def _run(x: torch.Tensor, config: Config, packed: PackedWeight, ready: prepack.Prepacked | None) -> torch.Tensor:
    if isinstance(config, GemmConfig):
        return gemm(x, packed, config=config)
    assert ready is not None
    if isinstance(config, half_bits.HalfConfig):
        return half_bits.multiply(x, ready, None, config).view(x.shape[0], -1)
    return one_bit.decode(x, ready, None, config).view(x.shape[0], -1)


def compile_all(work: Iterable[tuple[Shape, int]], permuted: bool) -> None:
    """Runs every candidate once, for Triton to keep what it compiles; failures are left to the timing to find."""
    for shape, tokens in work:
        out_features, in_features, planes = shape
        packed = random_weight(planes_layout(planes, col_scale=True), out_features, in_features, 128, permuted, "cuda")
        ready = prepack.prepack(packed) if tokens <= half_bits.MAX_TOKENS else None
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        for _, config in _calls(tokens, shape, permuted):
            try:
                _run(x, config, packed, ready)
                torch.cuda.synchronize()
            except Exception:
                continue


def tune(
    shapes: Iterable[Shape],
    tokens: Iterable[int] = TOKENS,
    workers: int = 0,
    deadline: float | None = None,
    permuted: bool = False,
) -> Iterator[tuple[Entry, float]]:
    """The fastest kernel of each product on the current CUDA device, one after another.

    From 3 to 16 tokens there are two: of `half_bits`, and of the one-bit kernel or, from 5 tokens on, those that read
    the stored order. A candidate counts only where its result agrees with a dense float32 product.

    Args:
        shapes: (out_features, in_features, planes) to time, with row and column scales.
        tokens: numbers of tokens.
        workers: processes that compile beforehand; 0 compiles while timing.
        deadline: `time.monotonic()` after which no more is timed.
        permuted: whether the columns have an order of their own, as with `act_order`.

    Yields:
        The entry, and the microseconds of torch's bfloat16 product of the same shape in the same run.
    """
    shapes, tokens = list(shapes), list(tokens)
    if workers:
        work = [(shape, count) for shape in shapes for count in tokens]
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=compile_all, args=(work[i::workers], permuted)) for i in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    for shape in shapes:
        yield from _tune_shape(shape, tokens, deadline, permuted)


def _tune_shape(
    shape: Shape, tokens: list[int], deadline: float | None, permuted: bool
) -> Iterator[tuple[Entry, float]]:
    out_features, in_features, planes = shape
    layout = planes_layout(planes, col_scale=True)
    count = copies_for(planes * out_features * in_features // 8)
    weights = [random_weight(layout, out_features, in_features, 128, permuted, "cuda", seed) for seed in range(count)]
    ready = [prepack.prepack(packed) for packed in weights] if min(tokens) <= half_bits.MAX_TOKENS else []
    dense = weights[0].unpack().dequantize()
    dense_count = copies_for(2 * out_features * in_features)
    copies = [dense.to(torch.bfloat16).T.contiguous().T for _ in range(dense_count)]
    for size in tokens:
        if deadline is not None and time.monotonic() > deadline:
            return
        x = torch.randn(size, in_features, device="cuda", dtype=torch.bfloat16)
        baseline = graph_time(lambda i, x=x: torch.mm(x, copies[i % dense_count].T), dense_count)  # type: ignore[misc]
        expected = x.float() @ dense.T
        best: dict[bool, tuple[float, str, Config]] = {}
        for kernel, config in _calls(size, shape, permuted):
            try:
                out = _run(x, config, weights[0], ready[0] if ready else None)
                if not (out.float() - expected).norm() < 1e-2 * expected.norm():
                    continue
                took = graph_time(
                    lambda i, x=x, c=config: _run(x, c, weights[i], ready[i] if ready else None),  # type: ignore[misc]
                    min(count, 16) if size > 128 else count,
                    5,
                )
            except Exception:  # a configuration that this GPU cannot run
                torch.cuda.synchronize()
                continue
            half = kernel == "half_bits"
            if half not in best or took < best[half][0]:
                best[half] = (took, kernel, config)
        for took, kernel, config in best.values():
            entry = Entry(out_features, in_features, planes, size, kernel, asdict(config), round(took, 2))
            yield entry, baseline
