"""Tokens per second of `generate` on the CPU: a model packed at one, two, ... planes against its dense bfloat16 twin.

    python benchmarks/decode_cpu.py MODEL

The linears of the decoder layers get random signs and scales, whose values do not matter to speed; the output layer
stays dense. All generate in turn, so that a change of the machine's speed meets all. The time of the prompt is left
out: a run of one new token is subtracted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from linear_cpu import packed_linear
from transformers import AutoModelForCausalLM, PreTrainedModel


def seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    """The time of `tokens` tokens after the first."""
    found = []
    for count in (1, tokens + 1):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found.append(time.perf_counter() - start)
    return found[1] - found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed of packed models on the CPU.")
    parser.add_argument("model")
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    models = {"dense": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)}
    for planes in args.planes.split(","):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        for name, module in list(model.base_model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                packed = packed_linear(module.out_features, module.in_features, int(planes))
                packed.bias = module.bias
                model.base_model.set_submodule(name, packed)
        models[f"{planes} plane{'s' * (planes != '1')}"] = model
    prompt = torch.arange(1, args.prompt_tokens + 1)[None]
    times: dict[str, list[float]] = {name: [] for name in models}
    for run in range(args.repeats + 1):
        for name, model in models.items():
            found = seconds(model.eval(), prompt, args.tokens)
            if run:  # the first run plans and pages in
                times[name].append(found)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16, {args.tokens} tokens")
    print("| model | tokens per second | times dense |")
    print("|---|---|---|")
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["dense"], found, strict=True))
        print(f"| {name} | {args.tokens / statistics.median(found):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
