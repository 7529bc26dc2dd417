"""The kernel of 8-bit digits on a GPU, beside bfloat16, the portable kernel, and what the package takes there.

    python benchmarks/digits_gpu.py --workers 15 --json digits_gpu.json

It is for GPUs without products of one bit, and runs on any whose tensor cores multiply 8-bit integers. Microseconds of
a call, everything that it does in it, from CUDA graphs over copies of the weight that do not fit the caches together,
median of the replays; every result is first compared with a float32 product. "default" is the cut that a shape takes
that no table knows, the next ones the fastest, as rows of a program, warps, stages, programs that share columns, and
units. "package" is the one-bit kernel where it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compile_first import compile_first

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import digits, dispatch, few_tokens, gemm, prepack
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, candidates
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight

SHAPES = "4096x4096,11008x4096,8192x8192,28672x8192"


def configs(packed: PackedWeight, m: int) -> list[GemmConfig]:
    """All that are timed: of digits, the default first, and of the portable kernel those with enough programs."""
    n, k = packed.out_features, packed.in_features
    found = [digits.default_config(packed, m), *digits.candidates(n, k, m)]
    portable = [c for c in candidates(n, k, m, hopper=False) if c.kernel == "portable" and c.block_n == 128]
    found += [c for c in portable if n * c.split_k >= 128 * 64 or c.split_k == 8]
    return list(dict.fromkeys(found))


def weight(n: int, k: int, planes: int, permuted: bool, seed: int = 0) -> PackedWeight:
    return random_weight(planes_layout(planes, col_scale=True), n, k, 128, permuted, "cuda", seed)


def compile_one(config: GemmConfig, n: int, k: int, planes: int, m: int, permuted: bool) -> None:
    gemm.gemm(torch.randn(m, k, device="cuda").bfloat16(), weight(n, k, planes, permuted), config=config)


def timed(call: Any, count: int, expected: torch.Tensor) -> float:
    """Microseconds of `call(copy)`; raises where its result is wrong."""
    error = float((call(0).float() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ArithmeticError(f"relative error {error:.2e}")
    return graph_time(call, count, 5)


def measure(n: int, k: int, planes: int, tokens: list[int], permuted: bool) -> list[dict[str, Any]]:
    count = copies_for(planes * n * k // 8)
    weights = [weight(n, k, planes, permuted, seed) for seed in range(count)]
    for packed in weights:
        few_tokens.prepare([packed])
    dense = weights[0].unpack().dequantize()
    dense_count = min(copies_for(2 * n * k), 8)
    copies = [dense.bfloat16() for _ in range(dense_count)]
    rows = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        expected = x.float() @ dense.T
        row: dict[str, Any] = {"shape": f"{n}x{k}", "planes": planes, "tokens": m, "times": [], "failed": []}
        row["bf16_us"] = timed(lambda i, x=x: torch.mm(x, copies[i % dense_count].T), dense_count, expected)
        row["package_us"] = timed(lambda i, x=x: dispatch.linear(x, weights[i], None), count, expected)
        for config in configs(weights[0], m):
            try:
                us = timed(lambda i, x=x, c=config: gemm.gemm(x, weights[i], config=c), count, expected)
            except Exception as failure:
                row["failed"].append(f"{config}: {type(failure).__name__}: {str(failure)[:150]}")
                torch.cuda.synchronize()
                continue
            row["times"].append({"us": us, "config": asdict(config)})
        default = asdict(digits.default_config(weights[0], m))
        row["default_us"] = next((t["us"] for t in row["times"] if t["config"] == default), None)
        row["times"].sort(key=lambda found: found["us"])
        rows.append(row)
    return rows


def told(row: dict[str, Any]) -> str:
    def best(kernel: str, count: int) -> str:
        of_kernel = [found for found in row["times"] if found["config"]["kernel"] == kernel][:count]
        cuts = ("block_n", "warps", "stages", "split_k", "tiles")
        return "; ".join(f"{f['us']:.1f} ({' '.join(str(f['config'][cut]) for cut in cuts)})" for f in of_kernel)

    default = "-" if row["default_us"] is None else f"{row['default_us']:.1f}"
    return (
        f"{row['shape']} planes {row['planes']} tokens {row['tokens']:>2}: bf16 {row['bf16_us']:.1f}, portable "
        f"{best('portable', 1)}, digits default {default}, {best('digits', 3)}, package {row['package_us']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--no-permutation", action="store_true")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after this many")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    torch.set_grad_enabled(False)
    tokens = [int(m) for m in args.tokens.split(",")]
    work = [
        (*(int(size) for size in shape.split("x")), int(planes))
        for shape in args.shapes.split(",")
        for planes in args.planes.split(",")
    ]
    permuted = not args.no_permutation
    if args.workers:
        tasks: dict[Any, Any] = {}
        for n, k, planes in work:
            packed = weight(n, k, planes, permuted)
            for m in tokens:
                for config in configs(packed, m):  # which sizes share a program, if 16 divides them
                    tasks.setdefault((config, planes, m, k % 2048), (config, n, k, planes, m, permuted))
        compile_first(compile_one, tasks.values(), args.workers)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    rows = []
    for n, k, planes in work:
        if time.monotonic() - start > args.seconds:
            print(f"{n}x{k} planes {planes}: not started, time was over")
            continue
        for row in measure(n, k, planes, tokens, permuted):
            rows.append(row)
            print(told(row), flush=True)
            for line in row["failed"][:2]:
                print("   failed:", line)
        prepack.forget()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
