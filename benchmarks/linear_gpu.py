"""One linear layer on a GPU: packed against torch's bfloat16 product and other quantized kernels, all in one run.

    python benchmarks/linear_gpu.py --json linear_gpu.json

Microseconds of a call, from CUDA graphs over copies of the weight that do not fit the caches together, median of
the replays; everything that a call does is in it (scaling and permuting x, adding parts). 12288x4096 and 22016x4096
are q, k and v, and gate and up of a 7B model, joined. Packed weights have row and column scales and a permutation
(`arb-hrc`). Kernels come from the package's table, nothing is tuned here. Every result is first compared with a
float32 product of the dequantized weight.

Peers are timed where they are installed: gemlite (A16W1, A16W2, A16W4), torchao (int4, groups of 128), bitsandbytes
(NF4).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator

import torch

from optimum_arb.layout import planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import dispatch, prepack
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight

LLAMA = {
    "7B": "4096x4096,12288x4096,11008x4096,22016x4096,4096x11008",
    "13B": "5120x5120,13824x5120,5120x13824",
    "70B": "1024x8192,8192x8192,28672x8192,8192x28672",
}
PEER_SHAPES = {(4096, 4096), (8192, 8192), (28672, 8192)}
PEER_TOKENS = (1, 4, 16, 64)


def bandwidth() -> float:
    """Bytes a microsecond that a sum over 512 MiB reads."""
    data = torch.empty(1 << 27, dtype=torch.float32, device="cuda").normal_()
    return data.numel() * 4 / graph_time(lambda i: data.sum(), 3)


def ours(n: int, k: int, planes: int) -> tuple[int, Callable[[torch.Tensor, int], torch.Tensor], torch.Tensor, int]:
    """Copies, the call, the dense weight, and the bytes of the packed one."""
    layout = planes_layout(planes, col_scale=True)
    count = copies_for(planes * n * k // 8)
    weights = [random_weight(layout, n, k, 128, True, "cuda", seed) for seed in range(count)]
    for packed in weights:
        dispatch.prepare([packed])
    nbytes = sum(t.numel() * t.element_size() for t in tensors(weights[0]))
    dense = weights[0].unpack().dequantize()
    return count, lambda x, i: dispatch.linear(x, weights[i], None), dense, nbytes


def tensors(packed: PackedWeight) -> Iterator[torch.Tensor]:
    for name in ("weight", "row_scale", "col_scale", "permutation"):
        tensor = getattr(packed, name)
        if tensor is not None:
            yield tensor


def gemlite(n: int, k: int, bits: int) -> tuple[int, Callable[[torch.Tensor, int], torch.Tensor]]:
    from gemlite import DType, GemLiteLinear

    count = min(copies_for(n * k * bits // 8), 12)
    layers = []
    for _ in range(count):
        layer = GemLiteLinear(
            bits, group_size=128, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        codes = torch.randint(0, 2**bits, (n, k), device="cuda", dtype=torch.uint8)
        scales = (torch.rand(n * k // 128, 1, device="cuda") * 0.02).bfloat16()
        zeros = torch.full((n * k // 128, 1), (2**bits - 1) / 2, device="cuda").bfloat16()
        layer.pack(codes, scales, zeros, None)
        layers.append(layer)
    return count, lambda x, i: layers[i](x)


def torchao_int4(n: int, k: int, bits: int) -> tuple[int, Callable[[torch.Tensor, int], torch.Tensor]]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    count = min(copies_for(n * k * bits // 8), 12)
    layers = [torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    for layer in layers:
        quantize_(layer, Int4WeightOnlyConfig(group_size=128))
    return count, lambda x, i: layers[i](x)


def nf4(n: int, k: int, bits: int) -> tuple[int, Callable[[torch.Tensor, int], torch.Tensor]]:
    from bitsandbytes.nn import Linear4bit

    count = min(copies_for(n * k * bits // 8), 12)
    layers = [
        Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda") for _ in range(count)
    ]
    return count, lambda x, i: layers[i](x)


PEERS: dict[str, tuple[Callable, int]] = {
    "gemlite A16W1": (gemlite, 1),
    "gemlite A16W2": (gemlite, 2),
    "gemlite A16W4": (gemlite, 4),
    "torchao int4": (torchao_int4, 4),
    "bitsandbytes NF4": (nf4, 4),
}


def bf16_times(n: int, k: int, inputs: dict[int, torch.Tensor]) -> dict[int, float]:
    """Microseconds of torch's product with a dense weight, by tokens."""
    count = copies_for(2 * n * k)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    return {m: graph_time(lambda i, x=x: torch.mm(x, dense[i].T), count) for m, x in inputs.items()}  # type: ignore[misc]


def our_rows(
    n: int, k: int, planes: int, inputs: dict[int, torch.Tensor], bf16: dict[int, float], speed: float
) -> Iterator[dict]:
    """One result by tokens of a packed weight."""
    count, call, weight, nbytes = ours(n, k, planes)
    for m, x in inputs.items():
        expected = x.float() @ weight.T
        error = float((call(x, 0).float() - expected).norm() / expected.norm())
        took = graph_time(lambda i, x=x: call(x, i), min(count, 12) if m > 128 else count)  # type: ignore[misc]
        percent = 100 * (nbytes + 2 * m * (n + k)) / took / speed
        yield {
            "shape": f"{n}x{k}",
            "planes": planes,
            "tokens": m,
            "bf16_us": bf16[m],
            "us": took,
            "times": bf16[m] / took,
            "bandwidth_percent": percent,
            "error": error,
        }


def peer_rows(name: str, n: int, k: int) -> Iterator[dict]:
    """One result by tokens of a peer's layer."""
    build, bits = PEERS[name]
    count, call = build(n, k, bits)
    for m in PEER_TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        call(x, 0)
        took = graph_time(lambda i, x=x: call(x, i), count)  # type: ignore[misc]
        yield {"peer": name, "shape": f"{n}x{k}", "tokens": m, "us": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(LLAMA.values()), help="OUTxIN,... (Llama 7B, 13B and 70B)")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,512,2048")
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape or peer after this many")
    parser.add_argument("--json")
    args = parser.parse_args()
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes.split(","))]
    tokens = [int(m) for m in args.tokens.split(",")]
    start = time.monotonic()
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; reads {speed / 1e6:.2f} TB/s", flush=True)
    rows, peers = [], []
    for n, k in shapes:
        if time.monotonic() - start > args.seconds:
            break
        inputs = {m: torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for m in tokens}
        bf16 = bf16_times(n, k, inputs)
        for planes in (int(p) for p in args.planes.split(",")):
            for row in our_rows(n, k, planes, inputs, bf16, speed):
                rows.append(row)
                print(
                    "{shape:>11} planes {planes} tokens {tokens:>4}: bf16 {bf16_us:7.1f} us, ours {us:7.1f} us, "
                    "{times:5.2f} times, {bandwidth_percent:4.0f} % of bandwidth, error {error:.1e}".format(**row),
                    flush=True,
                )
            prepack.forget()
            gc.collect()
            torch.cuda.empty_cache()
    for name in () if args.no_peers else PEERS:
        for n, k in shapes:
            if (n, k) not in PEER_SHAPES or time.monotonic() - start > args.seconds:
                continue
            try:
                for row in peer_rows(name, n, k):
                    peers.append(row)
                    print("{peer:>17} {shape} tokens {tokens:>4}: {us:7.1f} us".format(**row), flush=True)
            except Exception as error:
                print(f"{name:>17} {n}x{k}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "linear": rows, "peers": peers}, file, indent=1)


if __name__ == "__main__":
    main()
