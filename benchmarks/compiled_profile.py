"""Where the time of a token goes when a Llama-shaped model generates with a static cache, compiled: GPU and host.

    python benchmarks/compiled_profile.py --shape 7b --planes 0,1,2        # 0 is bfloat16

Batch 1, random weights, torch's profiler over 16 tokens, of which the last four are counted: what the GPU does from one
launch of the step's CUDA graph to the next, and what the host spends longest on meanwhile. The milliseconds of a token
are without the profiler, of 128 tokens less 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from random_packed import SHAPES, build
from torch.profiler import ProfilerActivity, profile

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
COUNTED = 4


def per_token(trace: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the last `COUNTED` tokens of a trace, in microseconds of one token.

    Args:
        trace: events as `torch.profiler` exports them.

    Returns:
        `wall`, `busy` (something runs on the GPU), the number of `kernels`, and by name what they take (`gpu`); `host`:
        the longest of what the host does in the last of these tokens.
    """
    launches = sorted((e for e in trace if e.get("name") == "cudaGraphLaunch"), key=lambda e: e["ts"])
    if len(launches) <= COUNTED:
        raise ValueError(f"{len(launches)} launches of a CUDA graph in the trace, {COUNTED + 1} are needed.")
    first, last = launches[-COUNTED - 1]["ts"], launches[-1]["ts"]
    ran = sorted((e for e in trace if e.get("cat") in ON_GPU and first <= e["ts"] < last), key=lambda e: e["ts"])
    busy, end = 0.0, 0.0
    by_name: dict[str, float] = defaultdict(float)
    for event in ran:
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(event["ts"], end))
        end = max(end, stop)
        by_name[event["name"]] += event["dur"] / COUNTED
    before = launches[-2]["ts"]
    host = [e for e in trace if e.get("cat") in ("cpu_op", "cuda_runtime", "user_annotation")]
    host = [e for e in host if before <= e["ts"] < last and "dur" in e]
    return {
        "wall": (last - first) / COUNTED,
        "busy": busy / COUNTED,
        "kernels": len(ran) / COUNTED,
        "gpu": sorted(by_name.items(), key=lambda item: -item[1]),
        "host": sorted(((e["name"], e["dur"]) for e in host), key=lambda item: -item[1]),
    }


@torch.no_grad()
def measure(shape: str, planes: int | None) -> tuple[float, dict[str, Any]]:
    """Milliseconds of a token without the profiler, and `per_token` with it."""
    model = build(shape, planes, "cuda")
    ids = torch.randint(1, model.config.vocab_size, (1, 64), device="cuda")

    def generate(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, cache_implementation="static"
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        generate(128)
    short, long = (statistics.median(generate(tokens) for _ in range(3)) for tokens in (64, 128))
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        generate(16)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    torch.compiler.reset()
    return (long - short) / 64 * 1e3, per_token(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--planes", default="0,1,2", help="0 is bfloat16 (default: 0,1,2)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("transformers compiles generation on a GPU alone, and there is none here")
    for planes in map(int, args.planes.split(",")):
        milliseconds, found = measure(args.shape, planes or None)
        print(
            f"{planes or 'bfloat16'}: {milliseconds:.2f} ms a token; profiled {found['wall']:.0f} us, GPU busy", end=" "
        )
        print(f"{found['busy']:.0f} us in {found['kernels']:g} kernels")
        for place in ("gpu", "host"):
            for name, taken in found[place][:12]:
                print(f"  {place} {taken:8.1f} us  {name[:80]}", flush=True)


if __name__ == "__main__":
    main()
