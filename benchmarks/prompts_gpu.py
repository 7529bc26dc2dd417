"""Prompts on a GPU: the kernel whose weights one warpgroup decodes for two others, beside what there was and bfloat16.

    python benchmarks/prompts_gpu.py --workers 15 --json prompts_gpu.json

Every form of the kernel is first compared with a float64 product, twice for the same bits; one that fails is not timed.
Then microseconds of a call from CUDA graphs over copies of the weight that do not fit the caches together, median of
the replays. "before" are the candidates without `specialized`. With --entries the fastest of all is written as a
table's lines, with --table into a copy of the package's own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import table
from optimum_arb.ops.backends.triton.gemm import gemm
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, candidates
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight

SHAPES = "4096x4096,11008x4096,4096x11008,8192x8192,28672x8192"


Task = tuple[GemmConfig, int, bool, int]


def compile_one(task: Task) -> None:
    config, planes, permuted, m = task
    packed = random_weight(planes_layout(planes, col_scale=True), 4096, 4096, 128, permuted, "cuda")
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    try:
        gemm(x, packed, config=config)
        torch.cuda.synchronize()
    except Exception:  # the check tells
        return


def compile_all(tasks: list[Task], workers: int, seconds: float) -> list[Task]:
    """Runs each once, in processes that are killed after that time; what was not done then."""
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        waiting = [(task, pool.apply_async(compile_one, (task,))) for task in tasks]
        left = []
        for task, result in waiting:
            try:
                result.get(timeout=max(0.05, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                left.append(task)
        pool.terminate()
    return left


def check(config: GemmConfig, planes: int, permuted: bool) -> str:
    """What is wrong with a form, or nothing."""
    packed = random_weight(planes_layout(planes, col_scale=True), 1008, 2432, 128, permuted, "cuda", 3)
    dense = packed.unpack().dequantize(torch.float64)
    for m in (509, 256):
        x = torch.randn(m, 2432, device="cuda", dtype=torch.bfloat16)
        expected = x.double() @ dense.T
        try:
            first, second = (gemm(x, packed, config=config) for _ in range(2))
        except Exception as failure:
            return f"{type(failure).__name__}: {str(failure)[-300:]}"
        error = float((first.double() - expected).norm() / expected.norm())
        if not error < 6e-3 or not torch.equal(first, second):
            return f"relative error {error:.2e}, same bits twice: {torch.equal(first, second)}"
    return ""


def measure(n: int, k: int, planes: int, permuted: bool, tokens: list[int], wrong: set[GemmConfig], replays: int):
    """A row for each number of tokens."""
    layout = planes_layout(planes, col_scale=True)
    count = min(copies_for(planes * n * k // 8), 8)
    weights = [random_weight(layout, n, k, 128, permuted, "cuda", seed) for seed in range(count)]
    dense_count = min(copies_for(2 * n * k), 4)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(dense_count)]
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        row: dict[str, Any] = {"shape": f"{n}x{k}", "planes": planes, "tokens": m, "times": [], "failed": []}
        row["bf16_us"] = graph_time(lambda i, x=x: torch.mm(x, dense[i].T), dense_count, replays)  # type: ignore[misc]
        for config in candidates(n, k, m):
            if replace(config, split_k=1) in wrong:
                continue
            try:
                took = graph_time(lambda i, x=x, c=config: gemm(x, weights[i], config=c), count, replays)  # type: ignore[misc]
            except Exception as failure:
                row["failed"].append(f"{config}: {type(failure).__name__}: {str(failure)[-200:]}")
                torch.cuda.synchronize()
                continue
            row["times"].append({"us": round(took, 2), "config": asdict(config)})
        row["times"].sort(key=lambda found: found["us"])
        yield row


def name(config: dict[str, Any]) -> str:
    if config["kernel"] != "hopper":
        return str(config["kernel"])
    return f"{config['block_m']}x{config['block_n']}s{config['stages']}k{config['split_k']}"


def entry(row: dict[str, Any]) -> table.Entry:
    """A table's entry of the fastest."""
    n, k = map(int, row["shape"].split("x"))
    best = row["times"][0]
    return table.Entry(n, k, row["planes"], row["tokens"], best["config"]["kernel"], best["config"], best["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="256,512,1024,2048")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    parser.add_argument("--plain", action="store_true", help="without an order of columns")
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=110, help="seconds after which no more is timed")
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--entries", type=Path, help="where the table's lines of the fastest go")
    parser.add_argument("--table", type=Path, help="where the package's table with those lines goes")
    args = parser.parse_args()
    start = time.monotonic()
    tokens, planes = ([int(number) for number in text.split(",")] for text in (args.tokens, args.planes))
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes.split(","))]
    permuted = not args.plain
    forms = {config for n, k in shapes for m in tokens for config in candidates(n, k, m)}
    wrong: dict[int, set[GemmConfig]] = {p: set() for p in planes}
    if args.workers:
        tasks = {
            (replace(config, split_k=min(config.split_k, 2)), p, permuted, 300) for config in forms for p in planes
        }
        tasks |= {(GemmConfig("hopper", 128, 128, 8, 4), p, permuted, m) for p in planes for m in tokens}
        for config, p, *_ in compile_all(sorted(tasks, key=str), args.workers, 70):
            wrong[p].add(replace(config, split_k=1))
            print(f"NOT DONE planes {p} {config}: it hangs, or waited for one that does", flush=True)
        print(f"compiled {len(tasks)} in {time.monotonic() - start:.0f} s", flush=True)
    for p in planes:
        for config in sorted({replace(c, split_k=1) for c in forms if c.specialized}, key=str):
            if config not in wrong[p] and (said := check(config, p, permuted)):
                wrong[p].add(config)
                print(f"WRONG planes {p} {name(asdict(config))}: {said}", flush=True)
    print(f"checked, {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    for n, k, p in ((n, k, p) for n, k in shapes for p in planes):
        if time.monotonic() - start < args.deadline:
            for row in measure(n, k, p, permuted, tokens, wrong[p], args.replays):
                rows.append(row)
                line = f"{row['shape']} planes {p} tokens {row['tokens']}: bf16 {row['bf16_us']:.1f}"
                for title, special in (("before", False), ("specialized", True)):
                    found = [f for f in row["times"] if f["config"]["specialized"] == special]
                    some = [f"{name(f['config'])} {f['us']:.1f} ({row['bf16_us'] / f['us']:.2f})" for f in found[:3]]
                    line += f" | {title} {', '.join(some) or '-'}"
                print(line, *row["failed"][:2], sep="\n   failed: " if row["failed"] else "", flush=True)
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"permuted": permuted, "rows": rows}, indent=1))
    entries = [entry(row) for row in rows if row["times"]]
    if args.entries:
        args.entries.write_text(",\n".join("  " + json.dumps(asdict(each)) for each in entries) + "\n")
    if args.table:
        shipped = Path(table.__file__).parent / "tables" / table.device_file(torch.device("cuda", 0))
        merged = {table.key(each): each for each in [*table.read(shipped), *entries]}
        args.table.parent.mkdir(parents=True, exist_ok=True)
        table.write(args.table, sorted(merged.values(), key=table.key))


if __name__ == "__main__":
    main()
