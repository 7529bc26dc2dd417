"""Products of many tokens with packed weights against torch's bf16 matmul of the same shape, in one run on one GPU.

    python benchmarks/gemm_gpu.py --json gemm.json

Every configuration is first compared with a float64 product of the same packed weight, into poisoned memory and twice
(same bits). Times are of CUDA graphs over copies of the weight that do not fit the L2 cache together, median of the
replays, in microseconds a call; what a call needs besides (gathering x's columns, adding parts) is in it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from optimum_arb.layout import layout_from_name
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton.columns import gather_columns
from optimum_arb.ops.backends.triton.dequantize import dequantize
from optimum_arb.ops.backends.triton.gemm import GemmConfig, candidates, gemm, gemm_input_grad
from optimum_arb.packing import packed_shapes

START = time.time()
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def random_weight(name: str, n: int, k: int, permuted: bool, dtype: torch.dtype, seed: int) -> PackedWeight:
    """Random bits and scales, drawn on the GPU. A name that ends in "-perm" has a permutation."""
    layout = layout_from_name(name)
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = {}
    for key, shape in packed_shapes(layout, n, k, 128, permuted).items():
        if key == "weight":
            tensors[key] = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
        elif key == "permutation":
            order = torch.randperm(k, device="cuda", generator=generator)
            tensors[key] = order.to(torch.int16 if k <= 2**15 else torch.int32)[None]
        else:
            values = torch.rand(shape, device="cuda", generator=generator) + 0.5
            tensors[key] = (values * (0.02 if key == "row_scale" else 1)).to(dtype)
    return PackedWeight(layout, 128, k, **tensors)


def parse(name: str) -> tuple[str, bool]:
    return name.removesuffix("-perm"), name.endswith("-perm")


def graph_time(call: Callable[[int], object], copies: int, replays: int) -> float:
    """Median microseconds of `call(i)`, i over the copies, from a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i % copies)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / copies)
    return statistics.median(times)


def poison(bytes_: int) -> None:
    """Leaves NaN in the memory that the next tensors of about this size will be given."""
    torch.full((bytes_ // 4 + 1024,), float("nan"), device="cuda")


def check(name: str, n: int, k: int, m: int, dtype: torch.dtype, config: GemmConfig, bias: bool) -> float:
    """Error against float64 over the norm of the result; infinite where a second call gives other bits."""
    weight = random_weight(parse(name)[0], n, k, parse(name)[1], dtype, seed=3)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    added = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    expected = x.double() @ weight.unpack().dequantize(torch.float64).T
    if bias:
        expected += added
    poison(4 * m * n * config.split_k)
    first = gemm(x, weight, added, config=config)
    poison(4 * m * n * config.split_k)
    if not torch.equal(first, gemm(x, weight, added, config=config)):
        return float("inf")
    return float((first.double() - expected).norm() / expected.norm())


def compile_one(job: tuple) -> str:
    """Runs one configuration on a weight of the shape's divisibility, so that it is in Triton's cache."""
    name, n, k, m, dtype, config, with_bias = job
    try:
        weight = random_weight(parse(name)[0], n, k, parse(name)[1], DTYPES[dtype], seed=0)
        x = torch.zeros(m, k, device="cuda", dtype=DTYPES[dtype])
        for bias in (None, x.new_zeros(n))[: 1 + with_bias]:
            gemm(x, weight, bias, config=config)
        if config.kernel == "dequantize":
            dequantize(weight, x.dtype)
            dequantize(weight, x.dtype, transposed=True)
        torch.cuda.synchronize()
    except Exception as error:  # reported, and left out of what follows
        return f"{name} {config}: {type(error).__name__}: {str(error)[-400:]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed products of many tokens against torch's bf16 matmul.")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,8192x8192,28672x8192", help="N x K")
    parser.add_argument("--m", default="32,64,128,512,2048")
    parser.add_argument("--layouts", default="planes-1,planes-2,planes-2-col,planes-2-col-perm,planes-1-col-perm")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--copies-mb", type=float, default=256)
    parser.add_argument("--replays", type=int, default=9)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--top", type=int, default=3, help="how many configurations are printed")
    parser.add_argument("--deadline", type=float, default=400, help="seconds after which no more is timed")
    parser.add_argument("--json", default="", help="where all figures go")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    tokens = [int(m) for m in args.m.split(",")]
    layouts = args.layouts.split(",")
    dtype = DTYPES[args.dtype]
    results: dict = {"device": torch.cuda.get_device_name(), "dtype": args.dtype, "errors": [], "rows": []}

    def left() -> float:
        return args.deadline - (time.time() - START)

    def save() -> None:
        if args.json:
            with open(args.json, "w") as file:
                json.dump(results, file, indent=1)

    # 1. compile in parallel: one job for each kernel that differs in more than its run-time arguments
    jobs = {}
    for n, k in shapes:
        for m in tokens:
            for config in candidates(n, k, m):
                for name in layouts:
                    split = min(config.split_k, 2)
                    key = (name, replace(config, split_k=split), m if config.kernel == "dequantize" else 0)
                    with_bias = config.block_m == config.block_n == 128 and config.warps == 8
                    jobs.setdefault(key, (name, n, k, m, args.dtype, key[1], with_bias))
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        errors = [error for error in pool.imap_unordered(compile_one, list(jobs.values())) if error]
    results["errors"] += errors
    print(f"{len(jobs)} kernels compiled in {time.time() - START:.0f} s, {len(errors)} failed", flush=True)
    for error in sorted(set(errors))[:10]:
        print("  " + error)
    bad = {error.split(": ")[0] for error in errors}

    # 2. correctness, each configuration on a small weight whose edges are ragged
    worst: dict[str, float] = {}
    wrong = set()
    limit = 6e-3 if dtype == torch.bfloat16 else 1.5e-3
    for name, _, _, m, _, config, with_bias in jobs.values():
        if f"{name} {config}" in bad or left() < 0.5 * args.deadline:
            continue
        try:
            # 1008 rows: ragged for every tile, but divisible by 16 as Triton's compiled forms tell apart
            choices = (False, True)[: 1 + with_bias]
            error = max(check(name, 1008, 2048, min(m, 300) - 3, dtype, config, bias) for bias in choices)
        except Exception as problem:
            results["errors"].append(f"{name} {config}: {problem}")
            print(f"FAILED {name} {config}: {str(problem)[-300:]}", flush=True)
            wrong.add((name, config))
            continue
        worst[name] = max(worst.get(name, 0.0), error)
        if not error < limit:
            wrong.add((name, config))
            print(f"WRONG {name} {config}: {error:.2e}", flush=True)
    results["largest_error"] = worst
    print("largest relative errors (norm):", {name: f"{error:.1e}" for name, error in worst.items()})
    print(f"[{time.time() - START:.0f} s] timing", flush=True)
    save()

    # 3. time
    for n, k in shapes:
        dense_copies = max(2, min(16, int(args.copies_mb * 1e6 / (2 * n * k)) + 1))
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(dense_copies)]
        base = {}
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            base[m] = graph_time(lambda i, x=x, dense=dense: torch.mm(x, dense[i].T), dense_copies, args.replays)
        del dense
        for name in layouts:
            size = n * k // 8 * layout_from_name(parse(name)[0]).planes
            # past 64 MB the 60 MB L2 holds little of what the next round reads
            copies = max(2, min(48, int(args.copies_mb * 1e6 / size) + 1))
            weights = [random_weight(*(parse(name)[0], n, k, parse(name)[1], dtype), seed=s) for s in range(copies)]
            extra = {
                "dequantize [N, K]": lambda i, w=weights: dequantize(w[i], dtype),
                "dequantize [K, N]": lambda i, w=weights: dequantize(w[i], dtype, transposed=True),
            }
            for label, call in extra.items():
                if left() > 0:
                    took = graph_time(call, min(copies, 8), args.replays)
                    results["rows"].append({"n": n, "k": k, "layout": name, "what": label, "us": took})
                    print(f"{n}x{k} {name:18s} {label}: {took:.1f} us, {2 * n * k / took / 1e6:.2f} TB/s written")
            for m in tokens:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                grad = torch.randn(m, n, device="cuda", dtype=dtype)
                found = []
                for config in candidates(n, k, m):
                    known = (name, replace(config, split_k=min(config.split_k, 2)))
                    if known in wrong or f"{name} {known[1]}" in bad:
                        continue
                    if left() < 0:
                        break
                    try:
                        took = graph_time(
                            lambda i, x=x, w=weights, c=config: gemm(x, w[i], config=c),
                            copies if m <= 512 else min(copies, 8),
                            args.replays if m <= 512 else 5,
                        )
                    except Exception as problem:
                        results["errors"].append(f"{n}x{k} {name} {config}: {problem}")
                        print(f"FAILED {n}x{k} {name} {config}: {str(problem)[-300:]}", flush=True)
                        continue
                    found.append((took, config))
                    row = {"n": n, "k": k, "m": m, "layout": name, "us": took, "blas_us": base[m], **asdict(config)}
                    results["rows"].append(row)
                if not found:
                    continue
                line = []
                if parse(name)[1] and left() > 0:
                    took = graph_time(lambda i, x=x, w=weights: gather_columns(x, w[i]), min(copies, 8), args.replays)
                    line.append(f"gather {took:.1f}")
                if m >= 512 and name == layouts[0] and left() > 0:
                    took = graph_time(lambda i, g=grad, w=weights: gemm_input_grad(g, w[i]), min(copies, 8), 5)
                    line.append(f"input grad {took:.1f}")
                found.sort(key=lambda pair: pair[0])
                dense_way = [took for took, config in found if config.kernel == "dequantize"]
                if dense_way:
                    line.append(f"dequantize+mm {dense_way[0]:.1f}")
                fused = [pair for pair in found if pair[1].kernel != "dequantize"][: args.top]
                line += [
                    f"{c.block_m}x{c.block_n}w{c.warps}s{c.stages}k{c.split_k} {took:.1f} ({base[m] / took:.2f})"
                    for took, c in fused
                ]
                print(f"{n}x{k} M={m:<5d} {name:18s} cublas {base[m]:.1f} | " + " | ".join(line), flush=True)
            del weights
            save()
    save()
    print(f"done in {time.time() - START:.0f} s")


if __name__ == "__main__":
    main()
