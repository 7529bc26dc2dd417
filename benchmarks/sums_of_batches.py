"""Whether X^T X of several batches depends on the order in which the batches are summed, and what float64 costs.

    python benchmarks/sums_of_batches.py MODEL [--layers 8]

Runs the first layers of a model on 16 sequences of 256 tokens of the bundled text. The products of the batches, of
float32, are summed in their order, and as two processes would: each its half, then the halves. Counted are the entries
that then differ, rounded to float32, for sums of float64 and of float32. Then the processor's time for `Statistic.add`
on 4096 inputs of 2048 features beside that of a product accumulated in float32, in one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb.calibration import load_texts
from optimum_arb.calibration.statistics import Statistic

BATCHES, LENGTH = 16, 256


class _Stop(Exception):
    pass


def products(name: str, layers: int) -> dict[str, list[torch.Tensor]]:
    """Name of a linear -> X^T X of each batch, float32; of linears with the same input, the first alone."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    ids = tokenizer(load_texts("wikitext-2")[0][:60000])["input_ids"][: BATCHES * LENGTH]
    found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def gather(key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            found[key].append(rows.T @ rows)

        return hook

    def stop(*args) -> None:
        raise _Stop

    for key, module in model.named_modules():
        if key.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
            module.register_forward_pre_hook(gather(key))
    model.model.layers[layers].register_forward_pre_hook(stop)
    with torch.no_grad():
        for batch in torch.tensor(ids).view(BATCHES, LENGTH):
            try:
                model(batch[None])
            except _Stop:
                continue
    return found


def summed(parts: list[torch.Tensor], which: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    total = torch.zeros_like(parts[0], dtype=dtype)
    for index in which:
        total += parts[index]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    entries, different = 0, {"float64": 0, "float32": 0}
    found = products(args.model, args.layers)
    for parts in found.values():
        entries += parts[0].numel()
        for name in different:
            dtype = getattr(torch, name)
            one = summed(parts, range(BATCHES), dtype)
            two = summed(parts, range(BATCHES // 2), dtype) + summed(parts, range(BATCHES // 2, BATCHES), dtype)
            different[name] += int((one.float() != two.float()).sum())
    x = torch.randn(4096, 2048)
    plain, statistic = torch.zeros(2048, 2048), Statistic(2048, x.device)
    seconds = {}
    for name, add in (("float32", lambda: plain.addmm_(x.T, x)), ("float64", lambda: statistic.add(x))):
        add()
        start = time.process_time()
        for _ in range(3):
            add()
        seconds[name] = (time.process_time() - start) / 3
    print(json.dumps({"matrices": len(found), "entries": entries, "different": different, "seconds": seconds}))


if __name__ == "__main__":
    main()
