"""Products of many tokens with packed weights against torch's bf16 matmul of the same shape, in one run on one GPU.

    python benchmarks/gemm_gpu.py --json gemm.json

Every configuration is first compiled and run once in a process of its own, so that one that fails or hangs is left
out. It is then compared with a float64 product of the same packed weight, into poisoned memory and twice
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

from optimum_arb.format.layout import layout_from_name
from optimum_arb.format.packing import packed_shapes
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import dequantize as dense_module
from optimum_arb.ops.backends.triton.columns import gather_columns
from optimum_arb.ops.backends.triton.dequantize import dequantize
from optimum_arb.ops.backends.triton.gemm import gemm, gemm_input_grad
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, candidates

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


# rows and warps of a program of the dequantizing kernel
DENSE_FORMS = ((32, 4), (32, 8), (64, 8), (128, 8))


def set_dense_form(rows: int, warps: int) -> None:
    dense_module.ROWS, dense_module.WARPS = rows, warps
    dense_module.TRANSPOSED_ROWS, dense_module.TRANSPOSED_WARPS = rows, warps


def compile_one(job: tuple) -> str:
    """Runs one configuration on a weight of the shape's divisibility, so that it is in Triton's cache."""
    name, n, k, m, dtype, config, with_bias = job
    try:
        weight = random_weight(parse(name)[0], n, k, parse(name)[1], DTYPES[dtype], seed=0)
        x = torch.zeros(m, k, device="cuda", dtype=DTYPES[dtype])
        if isinstance(config, tuple):
            set_dense_form(*config)
            dequantize(weight, x.dtype)
            dequantize(weight, x.dtype, transposed=True)
        else:
            for bias in (None, x.new_zeros(n))[: 1 + with_bias]:
                gemm(x, weight, bias, config=config)
        torch.cuda.synchronize()
    except Exception as error:  # reported, and left out of what follows
        return f"{type(error).__name__}: {str(error)[-400:]}"
    return ""


def compile_all(jobs: dict, processes: int, seconds: float) -> dict:
    """The errors of the jobs that failed, or that were not done in time."""
    errors = {}
    end = time.time() + seconds
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        waiting = {key: pool.apply_async(compile_one, (job,)) for key, job in jobs.items()}
        for key, result in waiting.items():
            try:
                error = result.get(timeout=max(0.05, end - time.time()))
            except multiprocessing.TimeoutError:
                error = "not done in time: it hangs, or waited for one that does"
            if error:
                errors[key] = error
        pool.terminate()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed products of many tokens against torch's bf16 matmul.")
    parser.add_argument("--shapes", default="4096x4096,8192x8192,28672x8192,11008x4096", help="N x K")
    parser.add_argument("--m", default="8,16,64,512,2048")
    parser.add_argument("--layouts", default="planes-1-col-perm,planes-2-col-perm")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--copies-mb", type=float, default=256)
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--top", type=int, default=3, help="how many configurations are printed")
    parser.add_argument("--deadline", type=float, default=150, help="seconds after which no more is timed")
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
                    key = (name, replace(config, split_k=min(config.split_k, 2)))
                    with_bias = config.kernel == "hopper" and (config.block_n, config.tiles) in ((64, 1), (256, 1))
                    jobs.setdefault(key, (name, n, k, m, args.dtype, key[1], with_bias and config.split_k == 1))
    for name in layouts:
        jobs.update({(name, form): (name, *shapes[0], 8, args.dtype, form, False) for form in DENSE_FORMS})
    # the sum of each number of parts is a kernel
    for parts in (4, 8, 16):
        config = GemmConfig("hopper", 8, 64, 4, 4, parts)
        jobs[(layouts[0], config)] = (layouts[0], 4096, 4096, 8, args.dtype, config, False)
    bad = compile_all(jobs, args.processes, min(60, 0.4 * args.deadline))
    print(f"{len(jobs)} kernels compiled in {time.time() - START:.0f} s, {len(bad)} failed", flush=True)
    for key, error in bad.items():
        results["errors"].append(f"{key}: {error}")
        print(f"  FAILED {key}: {error[-300:]}", flush=True)

    # 2. correctness, each configuration on a small weight whose edges are ragged
    worst: dict[str, float] = {}
    wrong = set(bad)
    limit = 6e-3 if dtype == torch.bfloat16 else 1.5e-3
    for key, (name, _, _, m, _, config, with_bias) in jobs.items():
        if key in bad or isinstance(config, tuple) or left() < 0.4 * args.deadline:
            continue
        try:
            # 1008 rows: ragged for every tile, but divisible by 16 as Triton's compiled forms tell apart; 19 tiles:
            # more than any ring holds, odd, and no multiple of the parts
            cases = [(1008, 2432, min(m, 300) - 3, b) for b in (False, True)[: 1 + with_bias]]
            error = max(check(name, n, k, rows, dtype, config, bias) for n, k, rows, bias in cases)
        except Exception as problem:
            results["errors"].append(f"{key}: {problem}")
            print(f"FAILED {key}: {str(problem)[-300:]}", flush=True)
            wrong.add(key)
            continue
        worst[name] = max(worst.get(name, 0.0), error)
        if not error < limit:
            wrong.add(key)
            print(f"WRONG {name} {config}: {error:.2e}", flush=True)
    results["largest_error"] = worst
    print("largest relative errors (norm):", {name: f"{error:.1e}" for name, error in worst.items()})
    print(f"[{time.time() - START:.0f} s] {len(jobs)} checked, {len(wrong)} wrong or failed; timing", flush=True)
    save()

    # 3. time
    def timed(label: str, call: Callable[[int], object], copies: int, replays: int) -> float | None:
        """`graph_time`, or None, said, where it fails or the time is up."""
        if left() < 0:
            return None
        try:
            return graph_time(call, copies, replays)
        except Exception as problem:
            results["errors"].append(f"{label}: {problem}")
            print(f"FAILED {label}: {str(problem)[-300:]}", flush=True)
            return None

    for n, k in shapes:
        if left() < 0:
            break
        base = {}
        count = max(2, min(16, int(args.copies_mb * 1e6 / (2 * n * k)) + 1))
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            took = timed(f"cublas {n}x{k} M={m}", lambda i, x=x, w=dense: torch.mm(x, w[i].T), count, args.replays)
            base[m] = took or float("nan")
        del dense
        for name in layouts:
            size = n * k // 8 * layout_from_name(parse(name)[0]).planes
            # past 64 MB the 60 MB L2 holds little of what the next round reads
            copies = max(2, min(24, int(args.copies_mb * 1e6 / size) + 1))
            weights = [random_weight(*(parse(name)[0], n, k, parse(name)[1], dtype), seed=s) for s in range(copies)]
            title = f"{n}x{k} {name}"
            forms = DENSE_FORMS if (n, k) == shapes[0] else ()
            before = dense_module.ROWS, dense_module.WARPS
            for form in forms:
                if (name, form) in bad:
                    continue
                set_dense_form(*form)
                line = []
                for transposed in (False, True):
                    label = f"{title} dequantize {'[K, N]' if transposed else '[N, K]'} {form}"
                    took = timed(
                        label, lambda i, w=weights, t=transposed: dequantize(w[i], dtype, transposed=t), 6, args.replays
                    )
                    if took:
                        results["rows"].append({"n": n, "k": k, "layout": name, "what": label, "us": took})
                        line.append(f"{took:.1f} us, {2 * n * k / took / 1e6:.2f} TB/s")
                print(f"{title} dequantize, {form[0]} rows w{form[1]}: [N, K] {' | [K, N] '.join(line)}", flush=True)
            if forms:
                set_dense_form(*before)
                dense_module.TRANSPOSED_ROWS = 2 * before[0]
            for m in tokens:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                used = copies if m < 512 else min(copies, 4)
                found = []
                for config in candidates(n, k, m):
                    if (name, replace(config, split_k=min(config.split_k, 2))) in wrong:
                        continue
                    took = timed(
                        f"{title} {config}",
                        lambda i, x=x, w=weights, c=config: gemm(x, w[i], config=c),
                        used,
                        args.replays if m < 512 else 4,
                    )
                    if took is None:
                        continue
                    found.append((took, config))
                    row = {"n": n, "k": k, "m": m, "layout": name, "us": took, "blas_us": base[m], **asdict(config)}
                    results["rows"].append(row)
                if not found:
                    continue
                line = []
                if parse(name)[1]:
                    took = timed(f"{title} gather", lambda i, x=x, w=weights: gather_columns(x, w[i]), used, 4)
                    line.append(f"gather {took:.1f}" if took else "")
                if m >= 512 and name == layouts[0]:
                    grad = torch.randn(m, n, device="cuda", dtype=dtype)
                    took = timed(f"{title} gradient", lambda i, g=grad, w=weights: gemm_input_grad(g, w[i]), used, 4)
                    line.append(f"input grad {took:.1f}" if took else "")
                found.sort(key=lambda pair: pair[0])
                dense_way = [took for took, config in found if config.kernel == "dequantize"]
                if dense_way:
                    line.append(f"dequantize+mm {dense_way[0]:.1f}")
                fused = [pair for pair in found if pair[1].kernel != "dequantize"][: args.top]
                for took, c in fused:
                    form = f"{c.block_m}x{c.block_n}w{c.warps}s{c.stages}t{c.tiles}k{c.split_k}"
                    line.append(f"{form} {took:.1f} ({base[m] / took:.2f})")
                print(f"{title} M={m:<5d} cublas {base[m]:.1f} | " + " | ".join(line), flush=True)
            del weights
            save()
    save()
    print(f"done in {time.time() - START:.0f} s")


if __name__ == "__main__":
    main()
