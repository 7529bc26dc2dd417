"""Measures the kernels on this GPU and finds the fastest for each shape and number of tokens."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch

from ....layout import planes_layout
from ..packed import PackedWeight
from . import one_bit, prepack
from .available import has_one_bit_kernel
from .gemm import GemmConfig, candidates, gemm
from .table import TOKENS, Entry
from .timing import copies_for, graph_time, random_weight

Shape = tuple[int, int, int]  # out_features, in_features, planes


def one_bit_candidates(out_features: int, in_features: int) -> list[one_bit.DecodeConfig]:
    """Cuts of the one-bit kernel worth timing for a weight `[out_features, in_features]`."""
    found = []
    for groups in (1, 2):
        for warps in (4, 8, 16):
            programs = -(-out_features // (prepack.ROWS * groups))
            if warps > max(4, in_features // prepack.SLOTS) or (groups > 1 and programs < 100):
                continue
            found += [one_bit.DecodeConfig(groups, warps, prefetch) for prefetch in (True, False)]
    return found


def _calls(tokens: int, shape: Shape) -> list[tuple[str, one_bit.DecodeConfig | GemmConfig]]:
    out_features, in_features, _ = shape
    if tokens <= one_bit.MAX_TOKENS:
        if not has_one_bit_kernel(torch.device("cuda", torch.cuda.current_device())):
            return []
        return [("one_bit", config) for config in one_bit_candidates(out_features, in_features)]
    return [(config.kernel, config) for config in candidates(out_features, in_features, tokens)]


def _run(
    x: torch.Tensor, config: one_bit.DecodeConfig | GemmConfig, packed: PackedWeight, ready: prepack.Prepacked | None
) -> torch.Tensor:
    if isinstance(config, GemmConfig):
        return gemm(x, packed, config=config)
    assert ready is not None
    return one_bit.decode(x, ready, None, config).view(x.shape[0], -1)


def compile_all(work: Iterable[tuple[Shape, int]]) -> None:
    """Runs every candidate once, for Triton to keep what it compiles; failures are left to the timing to find."""
    for shape, tokens in work:
        out_features, in_features, planes = shape
        packed = random_weight(planes_layout(planes, col_scale=True), out_features, in_features, 128, True, "cuda")
        ready = prepack.prepack(packed) if tokens <= one_bit.MAX_TOKENS else None
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        for _, config in _calls(tokens, shape):
            try:
                _run(x, config, packed, ready)
                torch.cuda.synchronize()
            except Exception:
                continue


def tune(
    shapes: Iterable[Shape], tokens: Iterable[int] = TOKENS, workers: int = 0, deadline: float | None = None
) -> Iterator[tuple[Entry, float]]:
    """The fastest kernel of each product on the current CUDA device, one after another.

    A candidate counts only where its result agrees with a dense float32 product.

    Args:
        shapes: (out_features, in_features, planes) to time, with row and column scales and a permutation.
        tokens: numbers of tokens.
        workers: processes that compile beforehand; 0 compiles while timing.
        deadline: `time.monotonic()` after which no more is timed.

    Yields:
        The entry, and the microseconds of torch's bfloat16 product of the same shape in the same run.
    """
    shapes, tokens = list(shapes), list(tokens)
    if workers:
        work = [(shape, count) for shape in shapes for count in tokens]
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=compile_all, args=(work[i::workers],)) for i in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    for shape in shapes:
        yield from _tune_shape(shape, tokens, deadline)


def _tune_shape(shape: Shape, tokens: list[int], deadline: float | None) -> Iterator[tuple[Entry, float]]:
    out_features, in_features, planes = shape
    layout = planes_layout(planes, col_scale=True)
    count = copies_for(planes * out_features * in_features // 8)
    weights = [random_weight(layout, out_features, in_features, 128, True, "cuda", seed) for seed in range(count)]
    ready = [prepack.prepack(packed) for packed in weights] if min(tokens) <= one_bit.MAX_TOKENS else []
    dense = weights[0].unpack().dequantize()
    dense_count = copies_for(2 * out_features * in_features)
    copies = [dense.to(torch.bfloat16).T.contiguous().T for _ in range(dense_count)]
    for size in tokens:
        if deadline is not None and time.monotonic() > deadline:
            return
        x = torch.randn(size, in_features, device="cuda", dtype=torch.bfloat16)
        baseline = graph_time(lambda i, x=x: torch.mm(x, copies[i % dense_count].T), dense_count)  # type: ignore[misc]
        expected = x.float() @ dense.T
        best: tuple[float, str, one_bit.DecodeConfig | GemmConfig] | None = None
        for kernel, config in _calls(size, shape):
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
            if best is None or took < best[0]:
                best = (took, kernel, config)
        if best is not None:
            entry = Entry(out_features, in_features, planes, size, best[1], asdict(best[2]), round(best[0], 2))
            yield entry, baseline
