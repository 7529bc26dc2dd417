"""What the Hadamard transform of the inputs costs on a GPU, as a part of the product's own launches and by itself.

    python benchmarks/hadamard_gpu.py --workers 15 --json hadamard_gpu.json

Microseconds of a product without a transform, with one in the launch that prepares the input ("fused", the kernels for
1 to 16 tokens), and with one in a launch of its own ("separate"), from CUDA graphs over copies of the weight that do
not fit the caches together, median of the replays. Kernels come from the package's table. A * is a product of 5 to 16
tokens of which the table says that the kernel with a fused transform is not the fastest: it is not used. Each result
is first compared with a float32 product of the float32 transform, twice for the same bits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compile_first import compile_first

from optimum_arb.format.hadamard import random_signs
from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import dispatch, few_tokens, half_bits, prepack
from optimum_arb.ops.backends.triton.available import fuses_hadamard
from optimum_arb.ops.backends.triton.hadamard import transform
from optimum_arb.ops.backends.triton.table import bucket, lookup
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight
from optimum_arb.ops.hadamard import transform as exact_transform

Call = Callable[[torch.Tensor, int], torch.Tensor]
Row = dict[str, Any]
MOST_ERROR = 0.01  # bfloat16 rounds x, what the separate launch makes of it, and the result


class Product:
    """Copies of one random weight's shape, with the calls that are compared."""

    def __init__(self, n: int, k: int, planes: int, copies: int | None = None, *, permuted: bool = False):
        layout = planes_layout(planes, col_scale=True)
        self.count = copies or copies_for(planes * n * k // 8)
        self.weights = [random_weight(layout, n, k, 128, False, "cuda", seed) for seed in range(self.count)]
        found = [few_tokens.prepare([packed]) for packed in self.weights]
        self.ready = [each for each in found if each is not None]
        assert len(self.ready) == self.count, "no one-bit kernel on this device"
        self.planes = planes
        self.dense = self.weights[0].unpack().dequantize()
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(k, generator=generator).to(torch.int16 if k <= 2**15 else torch.int32)
        self.order = order[None].cuda() if permuted else None
        self.sign = (random_signs(k, 0).to(torch.int8) * 2 - 1).cuda()

    def plain(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return dispatch.linear(x, self.weights[i], None)

    def separate(self, block: int) -> Call:
        return lambda x, i: self.plain(transform(x, self.order, self.sign, block), i)

    def fused(self, block: int, tokens: int) -> Call:
        change = (self.order, self.sign, block)
        if tokens <= self.ready[0].most_tokens:
            rows = (self.ready[0].rows,)
            return lambda x, i: few_tokens.run_prepared(x, self.ready[i], None, rows, shaped=True, change=change)
        entry = lookup(self.sign.device, self.ready[0].rows, len(self.sign), self.planes, bucket(tokens), True)
        config = half_bits.HalfConfig() if entry is None else half_bits.HalfConfig(**entry.config)
        return lambda x, i: half_bits.multiply(x, self.ready[i], None, config, change=change).view(len(x), -1)

    def calls(self, tokens: int, blocks: list[int]) -> list[tuple[str, int, Call]]:
        """Names, blocks and calls."""
        found: list[tuple[str, int, Call]] = [("none", 0, self.plain)]
        for block in blocks:
            if tokens <= half_bits.MAX_TOKENS:
                mark = "*" * (tokens > self.ready[0].most_tokens)
                found.append((f"fused{mark}", block, self.fused(block, tokens)))
            found.append(("separate", block, self.separate(block)))
        return found

    def wrong(self, x: torch.Tensor, block: int, call: Call) -> str | None:
        """What is wrong with the first copy's result."""
        given = exact_transform(x.float(), self.order, self.sign, block, backend="reference") if block else x.float()
        expected = given @ self.dense.T
        result = call(x, 0)
        error = float((result.float() - expected).norm() / expected.norm())
        if not error < MOST_ERROR:
            return f"relative error {error:.2e}"
        return None if torch.equal(call(x, 0), result) else "other bits at the second call"


def random_input(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)


def compile_one(n: int, k: int, planes: int, m: int, blocks: list[int], permuted: bool) -> None:
    product = Product(n, k, planes, 1, permuted=permuted)
    for _, _, call in product.calls(m, blocks):
        call(random_input(m, k), 0)


def measure(product: Product, tokens: list[int], blocks: list[int]) -> list[Row]:
    rows: list[Row] = []
    for m in tokens:
        x = random_input(m, product.weights[0].in_features)
        copies = min(product.count, 12) if m > 64 else product.count
        for name, block, call in product.calls(m, blocks):
            row: Row = {"tokens": m, "block": block, "kind": name, "wrong": product.wrong(x, block, call)}
            row["us"] = graph_time(lambda i, x=x, call=call: call(x, i), copies, 9)  # type: ignore[misc]
            rows.append(row)
    return rows


def table(rows: list[Row], tokens: list[int]) -> str:
    """Markdown: a line for each shape, number of planes, block and kind, a column for each number of tokens."""
    lines = ["| shape | planes | block | transform | " + " | ".join(f"M = {m}" for m in tokens) + " |"]
    lines.append("|---" * (len(tokens) + 4) + "|")
    found: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        kind = row["kind"].rstrip("*")
        cell = f"{row['us']:.1f} µs{'*' * (kind != row['kind'])}{' WRONG' * (row['wrong'] is not None)}"
        found.setdefault((row["shape"], row["planes"], row["block"] or "-", kind), {})[row["tokens"]] = cell
    for key, cells in found.items():
        lines.append("| " + " | ".join(map(str, key)) + " | " + " | ".join(cells.get(m, "-") for m in tokens) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,8192x8192")
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="1,4,16,64,512")
    parser.add_argument("--blocks", default="128,256")
    parser.add_argument("--permuted", action="store_true", help="the transform brings columns into an order too")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after this many")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    torch.set_grad_enabled(False)
    planes, tokens, blocks = ([int(n) for n in text.split(",")] for text in (args.planes, args.tokens, args.blocks))
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes.split(","))]
    if args.workers:
        tasks = [(n, k, p, m, blocks, args.permuted) for n, k in shapes for p in planes for m in tokens]
        compile_first(compile_one, tasks, args.workers)
    device = torch.device("cuda", torch.cuda.current_device())
    fuses = fuses_hadamard(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; fuses: {fuses}", flush=True)
    rows: list[Row] = []
    for n, k in shapes:
        for p in planes:
            if time.monotonic() - start > args.seconds:
                print(f"{n}x{k}, {p} planes: not started, time was over")
                continue
            found = measure(Product(n, k, p, permuted=args.permuted), tokens, blocks)
            rows += [{"shape": f"{n}x{k}", "planes": p, **row} for row in found]
            for row in found:
                if row["wrong"] is not None:
                    print("WRONG", f"{n}x{k}", p, row, flush=True)
            prepack.forget()
            torch.cuda.empty_cache()
    print(table(rows, tokens))
    print(f"{sum(row['wrong'] is not None for row in rows)} wrong, {time.monotonic() - start:.0f} s")
    if args.json:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "fuses": fuses, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
