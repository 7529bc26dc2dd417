"""Microseconds that torch takes before each compiled decoding step to see that nothing changed: bfloat16, and packed.

    python benchmarks/guard_time.py --layers 32

What it looks at ("guards") depends on a model's depth and not on its widths, so that small ones are measured, on a CPU:
code is compiled as for a GPU. Times are of the processor, so that what other jobs take is left out: the median of
interleaved rounds, and the least, which other jobs, too, touch least. The guards' nodes are of all layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from random_packed import SHAPES, build
from torch._dynamo import guards
from transformers import StaticCache

from optimum_arb.nn import compiled

TOKENS = 64  # of the cache


def compiled_guards(planes: int | None, permuted: bool) -> tuple[Any, dict[str, Any]]:
    """The root of the guards of a decoding step, and the variables that they look at.

    Args:
        planes: of packed weights; None for a bfloat16 model.
        permuted: whether columns of packed weights are permuted.
    """
    model = build("deep", planes, "cpu", permuted)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS)
    model(torch.zeros(1, 6, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    found: list[tuple[Any, dict[str, Any]]] = []
    original: Any = guards.CheckFunctionManager.__init__

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        variables = dict((args[1] if len(args) > 1 else kwargs["output_graph"]).local_scope)
        original(self, *args, **kwargs)
        found.append((self.guard_manager.root, variables))

    manager: Any = guards.CheckFunctionManager
    manager.__init__ = keep
    try:
        step: Callable[..., Any] = torch.compile(model.__call__, fullgraph=True, backend="eager")
        step(
            input_ids=torch.zeros(1, 1, dtype=torch.long),
            position_ids=torch.tensor([[6]]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    finally:
        manager.__init__ = original
    return found[-1]


def nodes(manager: Any) -> int:
    if hasattr(manager, "get_key_value_managers"):
        pairs = manager.get_key_value_managers().values()
        return 1 + sum(nodes(each) for pair in pairs for each in pair if each is not None)
    return 1 + sum(map(nodes, manager.get_child_managers()))


def clock(root: Any, variables: dict[str, Any], count: int = 40) -> float:
    start = time.thread_time()
    for _ in range(count):
        root.check(variables)
    return (time.thread_time() - start) / count * 1e6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--permuted", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    SHAPES["deep"] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 64}
    SHAPES["deep"]["num_hidden_layers"] = args.layers
    compiled.on_gpu = lambda x: True
    found = {"bf16": compiled_guards(None, False), "packed": compiled_guards(args.planes, args.permuted)}
    assert all(root.check(variables) for root, variables in found.values())
    times: dict[str, list[float]] = {way: [] for way in found}
    for _ in range(args.rounds):
        for way, (root, variables) in found.items():
            times[way].append(clock(root, variables))
    for way, (root, _) in found.items():
        taken = f"{statistics.median(times[way]):6.1f} us, least {min(times[way]):6.1f}"
        print(f"{way:6} {nodes(root):5} nodes, {taken} (torch {torch.__version__})")


if __name__ == "__main__":
    main()
