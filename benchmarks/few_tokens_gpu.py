"""Five to sixteen tokens on a GPU: every cut of the half-bits kernel, beside the stored-order kernels and bfloat16.

    python benchmarks/few_tokens_gpu.py --workers 15 --json few_tokens_gpu.json

First every layout, odd shapes, biases and joined weights are compared with a float64 product, twice for the same bits.
Then microseconds of a call from CUDA graphs over copies of the weight that do not fit the caches together, median of
the replays. "fused" is the fastest of the kernels that read the stored order ("table": as the package's table has it).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compile_first import compile_first

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.triton import gemm, half_bits, prepack
from optimum_arb.ops.backends.triton.table import bucket, lookup
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight

SHAPES = "4096x4096,11008x4096,8192x8192,28672x8192"


def check() -> list[str]:
    """What is wrong, with its relative error."""
    wrong = []
    cases = [
        (layout, rows, columns, block_size, tokens, half_bits.HalfConfig(*cut))
        for layout in all_layouts()
        if not layout.salient
        for rows, columns, block_size, tokens, cut in (
            (42, 320, 64, 5, (4, 2, 8)),
            (431, 1152, 128, 16, (8, 1, 4)),
            (96, 576, -1, 8, (4, 2, 2)),
            (1, 4304, 128, 9, (8, 4, 16)),
        )
    ]
    for layout, rows, columns, block_size, tokens, config in cases:
        packed = random_weight(layout, rows, columns, block_size, block_size != 64, "cuda", rows)
        bias = torch.randn(rows, device="cuda", dtype=torch.bfloat16) if tokens != 8 else None
        dense = packed.unpack().dequantize(torch.float64)
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        expected = x.double() @ dense.T + (0 if bias is None else bias.double())
        ready = prepack.prepack(packed)
        first, second = (half_bits.multiply(x, ready, bias, config).view(tokens, rows) for _ in range(2))
        error = float((first.double() - expected).norm() / expected.norm())
        if not (error < 4e-3 and torch.equal(first, second)):
            wrong.append(f"{layout.name} {rows}x{columns} block {block_size} tokens {tokens} {config}: {error:.2e}")
    parts = [random_weight(planes_layout(2, col_scale=True), n, 768, 128, True, "cuda", n) for n in (64, 7, 128)]
    joined = prepack.join([prepack.prepack(part) for part in parts])
    assert joined is not None
    x = torch.randn(11, 768, device="cuda", dtype=torch.float16)
    out = half_bits.multiply(x, joined, None, half_bits.HalfConfig(), (64, 7, 128))
    for part, found in zip(parts, out.split([11 * 64, 11 * 7, 11 * 128]), strict=True):
        expected = x.double() @ part.unpack().dequantize(torch.float64).T
        error = float((found.view(11, -1).double() - expected).norm() / expected.norm())
        if not error < 1e-3:
            wrong.append(f"joined, {part.out_features} rows: {error:.2e}")
    return wrong


def multiprocessors() -> int:
    return torch.cuda.get_device_properties("cuda").multi_processor_count


def compile_one(config: half_bits.HalfConfig, planes: int, tokens: int) -> None:
    packed = random_weight(planes_layout(planes, col_scale=True), 4096, 4096, 128, True, "cuda")
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    half_bits.multiply(x, prepack.prepack(packed), None, config)


def measure(n: int, k: int, planes: int, tokens: list[int]) -> list[dict[str, Any]]:
    layout = planes_layout(planes, col_scale=True)
    count = min(copies_for(planes * n * k // 8), 24)
    weights = [random_weight(layout, n, k, 128, True, "cuda", seed) for seed in range(count)]
    ready = [prepack.prepack(packed) for packed in weights]
    dense = weights[0].unpack().dequantize()
    dense_count = min(copies_for(2 * n * k), 8)
    copies = [dense.bfloat16() for _ in range(dense_count)]
    rows = []
    processors = multiprocessors()
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        expected = x.float() @ dense.T
        row: dict[str, Any] = {"shape": f"{n}x{k}", "planes": planes, "tokens": m, "half_bits": [], "failed": []}
        row["bf16_us"] = graph_time(lambda i, x=x: torch.mm(x, copies[i].T), dense_count, 5)  # type: ignore[misc]
        entry = lookup(x.device, n, k, planes, bucket(m))
        if entry is not None:
            fused = gemm.GemmConfig(**entry.config)
            row["fused_us"] = graph_time(lambda i, x=x, c=fused: gemm.gemm(x, weights[i], config=c), count, 5)  # type: ignore[misc]
        for config in half_bits.candidates(n, k, m, processors):
            try:
                out = half_bits.multiply(x, ready[0], None, config).view(m, n)
                error = float((out.float() - expected).norm() / expected.norm())
                if not error < 1e-2:
                    raise ArithmeticError(f"relative error {error:.2e}")
                took = graph_time(lambda i, x=x, c=config: half_bits.multiply(x, ready[i], None, c), count, 5)  # type: ignore[misc]
            except Exception as failure:
                row["failed"].append(f"{config}: {type(failure).__name__}: {str(failure)[:150]}")
                torch.cuda.synchronize()
                continue
            row["half_bits"].append({"us": took, "config": asdict(config), "error": error})
        row["half_bits"].sort(key=lambda found: found["us"])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="8,16")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    tokens = [int(m) for m in args.tokens.split(",")]
    planes = [int(p) for p in args.planes.split(",")]
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes.split(","))]
    if args.workers:
        tasks = {
            (config, p, 8 * -(-m // 8))
            for n, k in shapes
            for p in planes
            for m in tokens
            for config in half_bits.candidates(n, k, m, multiprocessors())
        }
        compile_first(compile_one, sorted(tasks, key=str), args.workers)
    wrong = [] if args.no_check else check()
    for line in wrong:
        print("WRONG", line)
    print(f"checked: {len(wrong)} wrong, {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    for n, k in shapes:
        for p in planes:
            for row in measure(n, k, p, tokens):
                rows.append(row)
                best = [f"{f['us']:.1f} ({', '.join(map(str, f['config'].values()))})" for f in row["half_bits"][:4]]
                print(
                    f"{row['shape']} planes {p} tokens {row['tokens']}: bf16 {row['bf16_us']:.1f}, fused "
                    f"{row.get('fused_us', float('nan')):.1f}, half_bits {'; '.join(best)}",
                    flush=True,
                )
                for line in row["failed"][:2]:
                    print("   failed:", line)
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"wrong": wrong, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
