"""Packed linears against dense ones of the same dtype on the CPU, side by side in one run, as in docs/benchmarks.md.

    python benchmarks/linear_cpu.py

The dense layer and those of one, two, ... planes are timed in turn, so that a change of the machine's speed meets all;
medians, and the medians of the ratios of neighbouring runs, are printed. With --clock cpu and one thread the time is
the processor's, which other programs on the machine lengthen less. Memory is the bytes of the tensors that each keeps.

    python benchmarks/linear_cpu.py --hadamard 64,128,256

compares the same layers with a Hadamard transform of the inputs, and without a permutation, instead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from optimum_arb.format.layout import planes_layout
from optimum_arb.format.packing import BinarizedWeight, block_count, stored_bytes
from optimum_arb.nn import ARBLinear
from optimum_arb.ops.backends.cpu import native


def packed_linear(rows: int, columns: int, planes: int, hadamard: int | None = None) -> ARBLinear:
    """Random signs and scales in the layout of arb-hrc, with the permutation that fits of block after block have, or,
    in its place, a Hadamard transform of such blocks (0 for none)."""
    generator = torch.Generator().manual_seed(0)
    layout = planes_layout(planes, col_scale=True)
    weight = BinarizedWeight(
        layout,
        128,
        torch.rand(planes, rows, columns, generator=generator) < 0.5,
        torch.rand(rows, block_count(columns, 128), planes, generator=generator),
        torch.rand(planes, columns, generator=generator),
        torch.randperm(columns, generator=generator) if hadamard is None else None,
    )
    if hadamard:
        weight.hadamard, weight.input_signs = hadamard, torch.rand(columns, generator=generator) < 0.5
    return ARBLinear.from_binarized(weight, None)


def interleaved(functions: list[Callable], repeats: int, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Median milliseconds of each, and for each the median of the first's time over its own."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(repeats + 3):
        for function, found in zip(functions, times, strict=True):
            start = clock()
            function()
            if run >= 3:  # the first calls plan, load and page in
                found.append(1000 * (clock() - start))
    ratios = [statistics.median(a / b for a, b in zip(times[0], found, strict=True)) for found in times]
    return [statistics.median(found) for found in times], ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed linears against dense ones on the CPU.")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="rows x columns, ...")
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="1,4,16,64,256,512")
    parser.add_argument("--dtypes", default="bfloat16,float32,float16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--hadamard", metavar="BLOCKS", help="layers without a transform of the inputs and with these")
    args = parser.parse_args()
    blocks = [None] if args.hadamard is None else [0, *(int(block) for block in args.hadamard.split(","))]
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    planes = [int(count) for count in args.planes.split(",")]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, kernel {native.best_kernel()}")
    kinds = [(count, block) for count in planes for block in blocks]
    heads = [
        f"{count} plane{'s' * (count > 1)}{f', Hadamard {block}' if block else ''}: ms | times dense | memory"
        for count, block in kinds
    ]
    print(f"| rows x columns | dtype | tokens | dense ms | {' | '.join(heads)} |")
    print("|" + "---|" * (4 + 3 * len(kinds)))
    with torch.no_grad():
        for shape in args.shapes.split(","):
            rows, columns = (int(size) for size in shape.split("x"))
            layers = [packed_linear(rows, columns, count, block) for count, block in kinds]
            for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
                dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
                size = dense.numel() * dense.element_size()
                for tokens in map(int, args.tokens.split(",")):
                    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
                    functions = [partial(F.linear, x, dense), *(partial(layer, x) for layer in layers)]
                    times, ratios = interleaved(functions, args.repeats, clock)
                    cells = [
                        f"{time:.2f} | {ratio:.2f} | {stored_bytes(layer.packed()) / size:.3f}"
                        for time, ratio, layer in zip(times[1:], ratios[1:], layers, strict=True)
                    ]
                    start = f"{rows} x {columns} | {str(dtype).split('.')[-1]} | {tokens} | {times[0]:.2f}"
                    print(f"| {start} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
