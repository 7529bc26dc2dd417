"""One linear layer on a GPU: packed against torch's bfloat16 product and other quantized kernels, all in one run.

    python benchmarks/linear_gpu.py --json linear_gpu.json

Microseconds of a call, from CUDA graphs over copies of the weight that do not fit the caches together, median of
the replays; everything that a call does is in it (scaling and permuting x, adding parts). Beside them stand how many
times faster than bf16 that is, and how much of the measured bandwidth it uses. Packed weights have row and
column scales and a permutation, as `arb-hrc` can make them; `--no-permutation` times them without. Kernels come from
the package's table, nothing is tuned here. Every result is first compared with a float32 product of the weight.

Peers are timed where they are installed, at `--peer-tokens`: gemlite (A16W1, A16W2, A16W4; groups of 128, its own
"fast" tuning), torchao (int4 in tiles, groups of 128) and bitsandbytes (NF4, blocks of 64). One that is missing or
fails is told with the reason. `--shapes` takes the names 7B, 13B and 70B (of Llama's layers; 12288x4096 and
22016x4096 are q, k and v, and gate and up of a 7B model, joined) as well as OUTxIN.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compile_first import compile_first

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import dispatch, few_tokens, prepack
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight

LLAMA = {
    "7B": "4096x4096,12288x4096,11008x4096,22016x4096,4096x11008",
    "13B": "5120x5120,13824x5120,5120x13824",
    "70B": "1024x8192,8192x8192,28672x8192,8192x28672",
}
SHAPES = "4096x4096,11008x4096,8192x8192,28672x8192"
TOKENS = "1,2,4,8,16,32,64,128,512,2048"
PEER_COPIES = 12  # quantizing more takes longer than timing them

# copies, the call of (x, copy), and the weight [N, K] of the first copy
Built = tuple[int, Callable[[torch.Tensor, int], torch.Tensor], torch.Tensor]
Row = dict[str, Any]


def bandwidth() -> float:
    """Bytes a microsecond that a sum over 512 MiB reads."""
    data = torch.empty(1 << 27, dtype=torch.float32, device="cuda").normal_()
    return data.numel() * 4 / graph_time(lambda i: data.sum(), 3)


def ours(n: int, k: int, planes: int, permuted: bool, copies: int | None = None) -> Built:
    """A packed weight and the operator's backend."""
    layout = planes_layout(planes, col_scale=True)
    count = copies or copies_for(planes * n * k // 8)
    weights = [random_weight(layout, n, k, 128, permuted, "cuda", seed) for seed in range(count)]
    for packed in weights:
        few_tokens.prepare([packed])
    return count, lambda x, i: dispatch.linear(x, weights[i], None), weights[0].unpack().dequantize()


def gemlite(n: int, k: int, bits: int, copies: int | None = None) -> Built:
    import triton.testing

    # what gemlite's tuning times its configurations with: 125 ms each otherwise, 20 of them a product
    triton.testing.do_bench = functools.partial(_do_bench(), warmup=3, rep=15)
    from gemlite import DType, GemLiteLinear

    count = copies or min(copies_for(n * k * bits // 8), PEER_COPIES)
    layers = []
    for index in range(count):
        layer = GemLiteLinear(
            bits, group_size=128, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        codes = torch.randint(0, 2**bits, (n, k), device="cuda", dtype=torch.uint8)
        scales = (torch.rand(n * k // 128, 1, device="cuda") * 0.02).bfloat16()
        zeros = torch.full((n * k // 128, 1), (2**bits - 1) / 2, device="cuda").bfloat16()
        if not index:
            weight = ((codes.view(-1, 128) - zeros.float()) * scales.float()).view(n, k)
        layer.pack(codes, scales, zeros, None)
        layers.append(layer)
    return count, lambda x, i: layers[i](x), weight


@functools.cache
def _do_bench() -> Callable:
    import triton.testing

    return triton.testing.do_bench


def _dense_layers(n: int, k: int, count: int) -> list[torch.nn.Linear]:
    return [torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def torchao_int4(n: int, k: int, bits: int, copies: int | None = None) -> Built:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    count = copies or min(copies_for(n * k * bits // 8), PEER_COPIES)
    layers = _dense_layers(n, k, count)
    weight = layers[0].weight.detach().float()
    for layer in layers:
        quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return count, lambda x, i: layers[i](x), weight


def nf4(n: int, k: int, bits: int, copies: int | None = None) -> Built:
    from bitsandbytes.nn import Linear4bit

    count = copies or min(copies_for(n * k * bits // 8), PEER_COPIES)
    layers, weight = [], None
    for dense in _dense_layers(n, k, count):
        weight = dense.weight.detach().float() if weight is None else weight
        layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.load_state_dict(dense.state_dict())
        layers.append(layer.to("cuda"))  # quantizes
    assert weight is not None
    return count, lambda x, i: layers[i](x), weight


# what the name stands for, its bits, and the relative error that is its rounding's and no fault
PEERS: dict[str, tuple[Callable[..., Built], int, float]] = {
    "gemlite A16W1": (gemlite, 1, 0.02),
    "gemlite A16W2": (gemlite, 2, 0.02),
    "gemlite A16W4": (gemlite, 4, 0.02),
    "torchao int4": (torchao_int4, 4, 0.2),
    "bitsandbytes NF4": (nf4, 4, 0.2),
}


def stored_bits(name: str) -> float:
    """Bits that a product reads of a weight: its codes, and its scales and zeros of a group."""
    kind, bits = name.split()
    if name == "bitsandbytes NF4":
        return 4 + 32 / 64  # a float32 scale of 64 weights
    if bits.startswith("plane"):
        return int(kind) * (1 + 16 / 128)
    return PEERS[name][1] + 32 / 128  # scale and zero


def bandwidth_percent(bits: float, n: int, k: int, tokens: int, us: float, speed: float) -> float:
    """How much of the memory's speed (bytes a microsecond) the least that a product reads and writes would take.

    Args:
        bits: of a stored weight.
        n, k, tokens: its sizes; x and y have 2 bytes a number.
        us: microseconds of a call.
        speed: what `bandwidth` measured.
    """
    return 100 * (bits / 8 * n * k + 2 * tokens * (n + k)) / us / speed


def missing(name: str) -> str | None:
    """Why a peer cannot be imported, None where it can."""
    try:
        __import__(name.split()[0])
    except Exception as error:  # a package for another CUDA fails in many ways
        return f"not installed ({type(error).__name__}: {str(error)[:200]})"
    return None


def compile_one(name: str, n: int, k: int, m: int, permuted: bool) -> None:
    logging.disable(logging.WARNING)
    if name in PEERS:
        built = PEERS[name][0](n, k, PEERS[name][1], 1)
    else:
        built = ours(n, k, int(name.split()[0]), permuted, 1)
    built[1](torch.randn(m, k, device="cuda", dtype=torch.bfloat16), 0)


def bf16_times(n: int, k: int, tokens: Iterable[int]) -> dict[int, float]:
    """Microseconds of torch's product with a dense weight, by tokens."""
    count = min(copies_for(2 * n * k), 16)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    found = {}
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        found[m] = graph_time(lambda i, x=x: torch.mm(x, dense[i].T), count, 5)  # type: ignore[misc]
    return found


def measure(
    name: str,
    build: Callable[[], Built],
    n: int,
    k: int,
    bf16: dict[int, float],
    tokens: list[int],
    most: float,
    speed: float,
) -> list[Row]:
    """One row by tokens; the reason instead of a time where there is none."""
    rows: list[Row] = [{"kernel": name, "shape": f"{n}x{k}", "tokens": m} for m in tokens]
    try:
        count, call, weight = build()
    except Exception as error:
        for row in rows:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        return rows
    for row in rows:
        try:
            x = torch.randn(row["tokens"], k, device="cuda", dtype=torch.bfloat16)
            expected = x.float() @ weight.T
            row["error"] = float((call(x, 0).float() - expected).norm() / expected.norm())
            if not row["error"] < most:
                row["failed"] = f"wrong: relative error {row['error']:.2g}"
                continue
            copies = min(count, 12) if row["tokens"] > 64 else count
            row["us"] = graph_time(lambda i, x=x: call(x, i), copies, 5)  # type: ignore[misc]
            row["times"] = bf16[row["tokens"]] / row["us"]
            row["bandwidth_percent"] = bandwidth_percent(stored_bits(name), n, k, row["tokens"], row["us"], speed)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            torch.cuda.synchronize()
    return rows


def table(rows: list[Row], tokens: list[int]) -> str:
    """Markdown: one line a shape and kernel, one column a number of tokens: microseconds, times bf16's, and percent of
    the measured bandwidth."""
    lines = ["| shape | kernel | " + " | ".join(f"M = {m}" for m in tokens) + " |", "|---" * (len(tokens) + 2) + "|"]
    by_kernel: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        by_kernel.setdefault((row["shape"], row["kernel"]), {})[row["tokens"]] = row
    for (shape, kernel), found in by_kernel.items():
        cells = []
        for m in tokens:
            row = found.get(m, {})
            times = f", {row['times']:.2f}x" if "times" in row else ""
            share = f", {row['bandwidth_percent']:.0f} %" if "us" in row else ""
            cells.append(f"{row['us']:.1f} µs{times}{share}" if "us" in row else "failed" if "failed" in row else "-")
        lines.append(f"| {shape} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default=SHAPES, help=f"OUTxIN or one of {', '.join(LLAMA)}, ... (default: {SHAPES})"
    )
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--no-permutation", action="store_true")
    parser.add_argument("--peers", default=",".join(PEERS), help="names separated by commas; empty for none")
    parser.add_argument("--peer-tokens", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new kernel and shape after this many")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first (of all products)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    logging.disable(logging.WARNING)  # peers tell of their tuning
    torch.set_grad_enabled(False)
    names = ",".join(LLAMA.get(name, name) for name in args.shapes.split(","))
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in names.split(","))]
    tokens = [int(m) for m in args.tokens.split(",")]
    peer_tokens = [m for m in map(int, args.peer_tokens.split(",")) if m in tokens]
    planes = [int(p) for p in args.planes.split(",")]
    permuted = not args.no_permutation
    reasons = {name: missing(name) for name in args.peers.split(",") if name}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name}: {reason}", flush=True)
    peers = [name for name, reason in reasons.items() if reason is None]
    if args.workers:
        tuned = [name for name in peers if name.startswith("gemlite")]
        tasks = [(name, n, k, m, permuted) for n, k in shapes for name in tuned for m in peer_tokens]
        tasks += [(f"{p} planes", n, k, m, permuted) for n, k in shapes for p in planes for m in tokens]
        compile_first(compile_one, tasks, args.workers, min(args.seconds * 0.6, 300))
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; reads {speed / 1e6:.2f} TB/s", flush=True)
    rows: list[Row] = []
    left: list[str] = []
    work: list[tuple[str, Callable[..., Built], list[int], float]] = [
        (f"{p} plane{'s' * (p > 1)}", functools.partial(ours, planes=p, permuted=permuted), tokens, 0.01)
        for p in planes
    ]
    work += [
        (name, functools.partial(PEERS[name][0], bits=PEERS[name][1]), peer_tokens, PEERS[name][2]) for name in peers
    ]
    try:
        for n, k in shapes:
            bf16 = bf16_times(n, k, tokens)
            for m, us in bf16.items():
                percent = bandwidth_percent(16, n, k, m, us, speed)
                row = {"kernel": "bf16", "shape": f"{n}x{k}", "tokens": m, "us": us, "bandwidth_percent": percent}
                rows.append(row)
            for name, build, at, most in work:
                if time.monotonic() - start > args.seconds:
                    left.append(f"{name} {n}x{k}")
                    continue
                found = measure(name, functools.partial(build, n, k), n, k, bf16, at, most, speed)
                rows += found
                for row in found:
                    said = (
                        row.get("failed")
                        or f"{row['us']:.1f} us, {row['times']:.2f} times bf16, error {row['error']:.1e}"
                    )
                    print(f"{n}x{k} {name} {row['tokens']}: {said}", flush=True)
                prepack.forget()
                gc.collect()
                torch.cuda.empty_cache()
    finally:
        print(table(rows, tokens))
        for what in left:
            print(f"{what}: not started, time was over")
        print(f"{time.monotonic() - start:.0f} s")
        if args.json:
            gone = {name: reason for name, reason in reasons.items() if reason}
            versions = {name.split()[0]: metadata.version(name.split()[0]) for name in peers}
            report = {
                "device": torch.cuda.get_device_name(),
                "bytes_per_us": speed,
                "versions": versions | {"torch": torch.__version__},
                "rows": rows,
            }
            args.json.write_text(json.dumps(report | {"not_installed": gone, "not_started": left}, indent=1))


if __name__ == "__main__":
    main()
