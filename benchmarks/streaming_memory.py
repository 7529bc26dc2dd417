"""Peak memory and seconds of binarizing from disk to disk, over the number of layers.

    python benchmarks/streaming_memory.py                          # 4, 8, 16 and 32 layers
    python benchmarks/streaming_memory.py --in-memory              # the same through from_pretrained, to compare
    python benchmarks/streaming_memory.py --activations-on-disk --plot layers.svg

Writes random Llama checkpoints of float32 (hidden size 512, 12.6 MB a layer) in several files, binarizes each in a
process of its own and reads that process's largest resident memory (VmHWM), mapped pages of the files included. What
the process holds before it begins, Python with its packages, is shown beside it, and what `estimate` says of the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_llama import random_llama
from transformers import LlamaForCausalLM

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.checkpoint.estimate import estimate


def memory(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def make_model(path: Path, layers: int, hidden: int) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    sizes = {"vocab_size": 1024, "hidden_size": hidden, "intermediate_size": hidden * 43 // 16}
    random_llama(num_hidden_layers=layers, **sizes, **heads).save_pretrained(path, max_shard_size="64MB")


def measure(args: argparse.Namespace) -> None:
    """One run, in this process: prints its figures as JSON."""
    tokens = torch.randint(
        5, 1024, (args.num_samples, args.sequence_length), generator=torch.Generator().manual_seed(0)
    )
    sizes = {"num_samples": len(tokens), "sequence_length": tokens.shape[1]}
    config = ARBConfig(**{"dataset": tokens, "method": args.method, **sizes, **args.config})
    told = estimate(args.source, config, budget=None, activations_on_disk=args.activations_on_disk)
    before, began = memory("VmHWM"), time.perf_counter()
    if args.in_memory:
        model = LlamaForCausalLM.from_pretrained(args.source, quantization_config=config)
        model.save_pretrained(args.out)
    else:
        quantize_checkpoint(args.source, args.out, config, activations_on_disk=args.activations_on_disk)
    seconds = time.perf_counter() - began
    figures = {"before": before, "peak": memory("VmHWM"), "seconds": seconds, "estimated": told.peak_ram_bytes}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--method", default="arb-hrc")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help="further choices of ARBConfig")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--activations-on-disk", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.source:
        measure(args)
        return
    rows = []
    print("layers  float checkpoint   peak memory     estimated   of it before the run    seconds")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder) / "float", layers, args.hidden_size)
            size = sum(file.stat().st_size for file in (Path(folder) / "float").glob("*.safetensors"))
            command = [sys.executable, __file__, *sys.argv[1:], "--source", f"{folder}/float", "--out", f"{folder}/out"]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(run.stdout.strip().splitlines()[-1])
        rows.append((layers, size, found["peak"], found["seconds"]))
        print(
            f"{layers:6}  {size / 1e6:13.1f} MB  {found['peak'] / 1e6:8.1f} MB  "
            f"{found['estimated'] / 1e6:8.1f} MB  {found['before'] / 1e6:17.1f} MB  {found['seconds']:10.1f}",
            flush=True,
        )
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (memory_axes, time_axes) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        layers, sizes, peaks, seconds = zip(*rows, strict=True)
        memory_axes.plot(layers, [peak / 1e6 for peak in peaks], "o-", label="peak memory")
        memory_axes.plot(layers, [size / 1e6 for size in sizes], "o--", label="float checkpoint")
        memory_axes.set(xlabel="layers", ylabel="MB", ylim=(0, None), xlim=(0, None))
        memory_axes.legend()
        time_axes.plot(layers, seconds, "o-")
        time_axes.set(xlabel="layers", ylabel="seconds", ylim=(0, None), xlim=(0, None))
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
