"""One packed linear against dense float32 `F.linear` on the CPU, side by side in one run, as in docs/benchmarks.md.

    python benchmarks/linear_cpu.py

The two are timed in turn, so that a change of the machine's speed meets both; medians, and the median of the ratios of
neighbouring runs, are printed. Memory is the bytes of the tensors that each keeps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from optimum_arb.algorithms import binarize
from optimum_arb.config import ARBConfig
from optimum_arb.nn import ARBLinear
from optimum_arb.packing import stored_bytes


def packed_linear(rows: int, columns: int, planes: int) -> ARBLinear:
    """A random weight binarized plane after plane, with the permutation that a calibrated one has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    config = ARBConfig(planes=planes, dataset=None, num_iterations=1, refinement_sweeps=0)
    binarized = binarize(weight, None, config)
    binarized.permutation = torch.randperm(columns, generator=generator)
    return ARBLinear.from_binarized(binarized, None)


def interleaved(first: Callable, second: Callable, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median of second over first."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(repeats + 3):
        for function, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if run >= 3:  # the first calls plan, load and page in
                found.append(1000 * (time.perf_counter() - start))
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed linear against dense float32 on the CPU.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="1,4,16,64,256")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    dense = torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(1))
    print(f"{args.rows} x {args.columns}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| planes | tokens | dense ms | packed ms | packed / dense | memory, packed / dense |")
    print("|---|---|---|---|---|---|")
    with torch.no_grad():
        for planes in map(int, args.planes.split(",")):
            layer = packed_linear(args.rows, args.columns, planes)
            memory = stored_bytes(layer.packed()) / (dense.numel() * dense.element_size())
            for tokens in map(int, args.tokens.split(",")):
                x = torch.randn(tokens, args.columns, generator=torch.Generator().manual_seed(2))
                times = interleaved(lambda x=x: F.linear(x, dense), lambda x=x, layer=layer: layer(x), args.repeats)
                print(
                    f"| {planes} | {tokens} | {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f} | {memory:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
