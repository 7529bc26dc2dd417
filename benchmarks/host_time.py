"""Microseconds of the host for the linear layers of a Llama-7B block: bfloat16, and packed in several ways.

    python setup.py build_ext --inplace; python benchmarks/host_time.py

Each number is a call's share of 20 calls that are queued without waiting for the GPU, the median of interleaved rounds.
Query, key and value (and gate and up) are called one after another, as a block does: "joined" computes them together,
"native" a prompt of each by itself (few tokens are always computed together), "triton" is without launch.c. What the
GPU takes is not in it as long as its queue has room.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton import native_launch
from optimum_arb.ops.backends.triton.timing import random_weight

HIDDEN, INNER = 4096, 11008
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("gate_proj", "up_proj"), (INNER, HIDDEN)),
    "down_proj": (HIDDEN, INNER),
}
CALLS = {
    "q/k/v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate/up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
WAYS = ("bf16", "triton", "native", "joined")


def block(planes: int | None, order: str = "none") -> nn.ModuleDict:
    """The linear layers of a block, random; in bfloat16 where `planes` is None.

    Args:
        planes: see above.
        order: of the columns: "none", "one" for all layers of an input, as calibrated models have it, or "own" ones.
    """
    layers = nn.ModuleDict()
    for name, (rows, columns) in SHAPES.items():
        if planes is None:
            layers[name] = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="cuda")
            continue
        layout = planes_layout(planes, col_scale=True)
        permuted = order != "none"
        layer = ARBLinear(columns, rows, layout, 128, bias=False, permuted=permuted, device="cuda")
        packed = random_weight(layout, rows, columns, 128, permuted, "cuda")
        for tensor in ("weight", "row_scale", "col_scale", *["permutation"] * permuted):
            target = layer.packed_parameter(tensor)
            assert target is not None
            target.copy_(getattr(packed, tensor))
        if order == "one":
            first = next(names[0] for names in CALLS.values() if name in names)
            if name != first:
                layer.weight_permutation.copy_(layers[first].weight_permutation)
        layers[name] = layer
    share_inputs(layers)
    return layers


def called(layers: nn.ModuleDict, names: tuple[str, ...], x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        for name in names:
            layers[name](x)

    return call


def native(layers: nn.ModuleDict) -> int:
    """Plans of these layers that launch natively."""
    found = [plan for layer in layers.values() for plan in (layer._plans or {}).values()]
    copies = [layer._prepared for layer in layers.values()] + [
        layer.shared_input._prepared for layer in layers.values() if layer.shared_input is not None
    ]
    unique = {id(made): made for made in copies if made is not None}
    found += [plan for made in unique.values() for plan in made.plans.values()]
    groups = {id(layer.shared_input): layer.shared_input for layer in layers.values() if layer.shared_input is not None}
    found += [plan for group in groups.values() for plan in (group._prompts._plans or {}).values()]
    return sum(plan is not None and plan.native is not None for plan in found)


def clock(call: Callable[[], None], count: int = 20) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return took / count * 1e6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", default="1,16,64,512", help="from 64 on those of one prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--order", choices=("none", "one", "own"), default="none", help="of the columns")
    args = parser.parse_args()
    dense = block(None)
    for planes in map(int, args.planes.split(",")):
        packed = block(planes, args.order)
        ways = {"bf16": dense, "triton": copy.deepcopy(packed), "native": copy.deepcopy(packed), "joined": packed}
        for way in ("triton", "native"):
            share_inputs(ways[way])
            for layer in ways[way].values():
                if layer.shared_input is not None:
                    layer.shared_input.joins_prompts = False
        for tokens in map(int, args.tokens.split(",")):
            shape = (1, tokens) if tokens >= 64 else (tokens, 1)
            found: dict[str, dict[str, list[float]]] = {}
            for name, layers in CALLS.items():
                x = torch.randn(*shape, SHAPES[layers[0]][1], dtype=torch.bfloat16, device="cuda")
                calls = {way: called(modules, layers, x) for way, modules in ways.items()}
                for way, call in calls.items():
                    with mock.patch.object(
                        native_launch, "load", native_launch.load if way != "triton" else lambda: None
                    ):
                        for _ in range(3):
                            call()
                times = found[name] = {way: [] for way in WAYS}
                for _ in range(args.rounds):
                    for way, call in calls.items():
                        times[way].append(clock(call))
            taken = ", ".join(f"{way} {native(ways[way])}" for way in WAYS[1:])
            print(f"planes {planes}, tokens {tokens} (plans that launch natively: {taken})")
            total = dict.fromkeys(WAYS, 0.0)
            for name, times in found.items():
                median = {way: statistics.median(times[way]) for way in WAYS}
                total = {way: total[way] + median[way] for way in WAYS}
                print(f"  {name:8}", "  ".join(f"{way} {median[way]:6.1f}" for way in WAYS), flush=True)
            print("  all     ", "  ".join(f"{way} {total[way]:6.1f}" for way in WAYS), flush=True)


if __name__ == "__main__":
    main()
