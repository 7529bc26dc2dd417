"""`generate` of Llama-shaped models in bfloat16 and packed, with random weights, in one run on one GPU.

    python benchmarks/generate_gpu.py --shape 7b --batch 1,16 --planes 1,2

Packed weights are random bits and scales of the right shapes (`arb-hrc`: row and column scales, a permutation), so
nothing is calibrated: speed and memory do not depend on the values. Times are of a call with the same lengths as the
warm-up. `step` is one decoding step of the compiled model replayed as one CUDA graph: what the GPU alone takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from optimum_arb.layout import planes_layout
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton.timing import random_weight

SHAPES = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def build(shape: str, planes: int | None) -> LlamaForCausalLM:
    """A random model on the GPU in bfloat16; its decoder linears packed where `planes` is given."""
    config = LlamaConfig(**SHAPES[shape], vocab_size=32000, max_position_embeddings=4096)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if planes is not None:
        layout = planes_layout(planes, col_scale=True)
        for name, module in list(model.named_modules()):
            if type(module) is not torch.nn.Linear or name == "lm_head":
                continue
            layer = ARBLinear(
                module.in_features, module.out_features, layout, 128, bias=False, permuted=True, device="meta"
            )
            model.set_submodule(name, layer)
    model = model.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ARBLinear):
                packed = random_weight(module.layout, module.out_features, module.in_features, 128, True, "cuda")
                for name in ("weight", "row_scale", "col_scale", "permutation"):
                    target, source = module.packed_parameter(name), getattr(packed, name)
                    assert target is not None
                    target.copy_(source * 0.05 if name == "row_scale" else source)
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1)
        model.model.rotary_emb.__init__(config, device="cuda")  # to_empty leaves its buffer unset
    if planes is not None:
        share_inputs(model)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def clock(call, repeats: int) -> float:
    """Median seconds of a call that ends with the GPU's work done."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(
    model: LlamaForCausalLM, batch: int, prompt: int, new: int, compiled: bool, eager: bool
) -> dict[str, float]:
    """Tokens per second of `generate`, milliseconds of a step as one graph and of the prompt."""
    ids = torch.randint(0, 32000, (batch, prompt), device="cuda")
    fixed = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    found: dict[str, float] = {}
    with torch.no_grad():
        found["prefill_ms"] = clock(lambda: (model(ids), model(ids))[0], 5) / 2 * 1e3
        if eager:
            short = {**fixed, "min_new_tokens": new // 4, "max_new_tokens": new // 4}
            model.generate(ids, **short)
            found["eager_tokens_per_second"] = batch * (new // 4) / clock(lambda: model.generate(ids, **short), 2)
        found["step_ms"] = step(model, batch, prompt)
        if compiled:
            for _ in range(2):
                model.generate(ids, cache_implementation="static", **fixed)
            seconds = clock(lambda: model.generate(ids, cache_implementation="static", **fixed), 3)
            found["compiled_tokens_per_second"] = batch * new / seconds
    return found


def step(model: LlamaForCausalLM, batch: int, length: int) -> float:
    """Milliseconds of one decoding step, uncompiled, replayed as one CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=length + 64)
    ids = torch.randint(0, 32000, (batch, length), device="cuda")
    model(ids, past_key_values=cache)
    token = ids[:, :1].clone()
    position = torch.full((batch, 1), length, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def forward() -> None:
        model(token, past_key_values=cache, position_ids=position, cache_position=position[0])

    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return clock(graph.replay, 20) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--planes", default="1,2")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--no-compiled", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for planes in (None, *(int(p) for p in args.planes.split(","))):
        torch.cuda.reset_peak_memory_stats()
        model = build(args.shape, planes)
        for batch in (int(b) for b in args.batch.split(",")):
            torch._dynamo.reset()
            try:
                found = measure(model, batch, args.prompt, args.new_tokens, not args.no_compiled, not args.no_eager)
            except Exception as error:
                print(f"planes {planes} batch {batch}: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
                continue
            row = {"model": args.shape, "planes": planes, "batch": batch, **found}
            row["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    for row in rows:
        base = next((r for r in rows if r["planes"] is None and r["batch"] == row["batch"]), None)
        if base is not None and row is not base:
            keys = ("eager_tokens_per_second", "compiled_tokens_per_second")
            ratios = {k: row[k] / base[k] for k in keys if k in row and k in base}
            ratios |= {k: base[k] / row[k] for k in ("step_ms", "prefill_ms", "peak_gigabytes")}
            print(
                f"planes {row['planes']} batch {row['batch']}, times bf16:", {k: round(v, 2) for k, v in ratios.items()}
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
