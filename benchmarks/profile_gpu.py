"""Calls of packed layers under Nsight Compute, each after the caches were filled with something else.

    ncu --profile-from-start off --nvtx --print-nvtx-rename kernel --clock-control none --csv --metrics \\
        gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,\\
    sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active \\
        python benchmarks/profile_gpu.py

A kernel's name has the call before it: planes x rows x columns x tokens.
"""

from __future__ import annotations

import argparse

import torch

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear
from optimum_arb.ops.backends.triton.timing import random_weight

CACHES = 200 << 20  # bytes, three times those of an H200


def random_layer(planes: int, rows: int, columns: int) -> ARBLinear:
    """Random signs and scales, on the GPU."""
    layout = planes_layout(planes, col_scale=True)
    layer = ARBLinear(columns, rows, layout, 128, bias=False, permuted=False, device="cuda")
    packed = random_weight(layout, rows, columns, 128, False, "cuda")
    for name in ("weight", "row_scale", "col_scale"):
        target = layer.packed_parameter(name)
        assert target is not None
        target.copy_(getattr(packed, name))
    return layer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,28672x8192")
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="1,4,16,64,512")
    args = parser.parse_args()
    calls = []
    for planes in map(int, args.planes.split(",")):
        for rows, columns in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
            layer = random_layer(planes, rows, columns)
            for tokens in map(int, args.tokens.split(",")):
                x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
                for _ in range(2):  # compiles
                    layer(x)
                calls.append((f"{planes}x{rows}x{columns}x{tokens}", layer, x))
    other = torch.empty(CACHES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for name, layer, x in calls:
        other.zero_()
        torch.cuda.nvtx.range_push(name)
        layer(x)
        torch.cuda.nvtx.range_pop()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
