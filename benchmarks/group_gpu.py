"""Query, key and value, or gate and up, of one input on a Hopper GPU: what their common launches save.

    python benchmarks/group_gpu.py --json group_gpu.json    # three minutes, most of them compilation

Microseconds of all products of one input, from CUDA graphs over copies of the weights that do not fit the caches
together, median of the replays. Before each group torch writes x, as a norm does in a model, so that no launch of the
group overlaps with the group before; "torch" is that kernel alone, and is part of all the others. All ways compute the
same bits:

alone     each product by itself: x scaled for it, the product, the sum of its parts
in turn   as a group, whose launches have one piece of memory in turn
together  one launch before the first product, one sum behind the last
beside    with products that compute beside each other
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import dispatch, gemm, hopper_group, hopper_product
from optimum_arb.ops.backends.triton.timing import copies_for, graph_time, random_weight

GROUPS = {
    "7b attention": ((4096, 4096, 4096), 4096),
    "7b mlp": ((11008, 11008), 4096),
    "13b attention": ((5120, 5120, 5120), 5120),
    "70b attention": ((8192, 1024, 1024), 8192),
    "70b mlp": ((28672, 28672), 8192),
}
# bytes that may lie side by side, products beside each other
WAYS = {"in turn": (0, False), "together": (hopper_group.TOGETHER, False), "beside": (hopper_group.TOGETHER, True)}


def measure(rows: tuple[int, ...], columns: int, planes: int, tokens: int, permuted: bool) -> dict[str, float]:
    """Microseconds of each way.

    Raises:
        RuntimeError: one has other bits than the products alone.
    """
    layout, device = planes_layout(planes, col_scale=True), torch.device("cuda", torch.cuda.current_device())
    copies = copies_for(sum(rows) * columns * planes // 8)
    weights = [
        [random_weight(layout, n, columns, 128, permuted, "cuda", 7 * i + j) for j, n in enumerate(rows)]
        for i in range(copies)
    ]
    given = torch.randn(tokens, columns, device=device).bfloat16()
    x = torch.empty_like(given)
    configs = [dispatch._config(device, x.dtype, tokens, packed) for packed in weights[0]]
    nothing = [None] * len(rows)

    def by_itself(i: int) -> list[torch.Tensor]:
        torch.mul(given, 1, out=x)
        return [plan.run(x, None) for plan in alone[i]]

    plans = [[gemm.plan(x, packed, None, config) for packed, config in zip(of, configs, strict=True)] for of in weights]
    alone = [[plan for plan in of if plan is not None] for of in plans]
    if any(len(of) < len(rows) for of in alone):
        return {}
    found = {"torch": graph_time(lambda i: torch.mul(given, 1, out=x), copies)}
    expected = [[by_itself(i) for _ in range(3)][-1] for i in range(copies)]
    found["alone"] = graph_time(by_itself, copies)
    for name, (hopper_group.TOGETHER, hopper_product.BESIDE) in WAYS.items():
        groups = [gemm.plan_group(x, of, nothing, configs, None) for of in weights]

        def together(i: int, groups: list[hopper_group.HopperGroup | None] = groups) -> list[torch.Tensor]:
            torch.mul(given, 1, out=x)
            group = groups[i]
            assert group is not None
            return group.run(x)

        for _ in range(3):
            for i in range(copies):
                if not all(torch.equal(one, other) for one, other in zip(together(i), expected[i], strict=True)):
                    raise RuntimeError(f"{name}: other bits than alone, {rows} x {columns}, {planes}, {tokens}")
        found[name] = graph_time(together, copies)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="16,64")
    parser.add_argument("--permuted", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for name in args.groups.split(","):
        for planes in map(int, args.planes.split(",")):
            for tokens in map(int, args.tokens.split(",")):
                found = measure(*GROUPS[name], planes, tokens, args.permuted)
                results.append({"group": name, "planes": planes, "tokens": tokens, "microseconds": found})
                figures = ", ".join(f"{way} {time:.1f}" for way, time in found.items())
                print(f"{name}, {planes} planes, {tokens} tokens: {figures or 'not by this kernel'}", flush=True)
                if args.json is not None:
                    content = {"device": torch.cuda.get_device_name(), "results": results}
                    args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
