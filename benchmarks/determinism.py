"""Whether a model comes out in the same bytes: runs, threads and batch sizes, each in a process of its own.

    python benchmarks/determinism.py MODEL --layers 2
    python benchmarks/determinism.py MODEL --layers 2 --device cuda       # against the CPU too

MODEL is a directory of a float model with its tokenizer. It is cut to its first layers, binarized with calibration and
compared with the first run, tensor by tensor: how many differ, how many of the stored signs, and the seconds of a run
(wall clock and processor, loading included).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

_RUN = """
import json, resource, sys, time
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from optimum_arb import ARBConfig
logging.set_verbosity_error()
model, out, layers, dtype, device, choices = sys.argv[1:]
config = ARBConfig(**json.loads(choices))
start = time.perf_counter()
loaded = AutoModelForCausalLM.from_pretrained(
    model, quantization_config=config, num_hidden_layers=int(layers), dtype=getattr(torch, dtype), device_map=device
)
wall = time.perf_counter() - start
loaded.save_pretrained(out)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"wall": wall, "processor": usage.ru_utime + usage.ru_stime}))
"""


def run(args: argparse.Namespace, out: Path, threads: int, device: str, batch_size: int | None) -> dict[str, float]:
    """Binarizes into `out`; returns its seconds."""
    choices = {
        "planes": args.planes,
        "num_samples": args.samples,
        "sequence_length": args.length,
        "batch_size": batch_size,
        "method": args.method,
        "num_iterations": args.iterations,
    }
    command = [sys.executable, "-c", _RUN, args.model, str(out), str(args.layers), args.dtype, device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    found = subprocess.run(
        [*command, json.dumps(choices)], env=environment, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def compare(first: Path, second: Path) -> tuple[int, int, float]:
    """How many tensors differ, of how many, and the share of the packed bits that do."""
    here, there = (load_file(path / "model.safetensors") for path in (first, second))
    assert here.keys() == there.keys()
    different = [name for name in here if not torch.equal(here[name], there[name])]
    bits = turned = 0
    for name, tensor in here.items():
        if tensor.dtype == torch.uint8:
            bits += tensor.numel() * 8
            changed = tensor ^ there[name]
            turned += sum(int((changed >> shift & 1).sum()) for shift in range(8))
    return len(different), len(here), turned / max(1, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether a model comes out in the same bytes.")
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--method", default="arb-hrc")
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None, help="compare with runs on this device too")
    args = parser.parse_args()
    runs: list[tuple[str, int, str, int | None]] = [
        ("1 thread", 1, "cpu", None),
        ("1 thread again", 1, "cpu", None),
        ("2 threads", 2, "cpu", None),
        ("1 thread, batches of 4", 1, "cpu", 4),
    ]
    if args.device is not None:
        runs += [(f"{args.device}", 1, args.device, None), (f"{args.device} again", 1, args.device, None)]
    print(f"torch {torch.__version__}, {args.method}, {args.layers} layers, {args.dtype}", end=", ")
    print(f"{args.samples} x {args.length} calibration tokens")
    print("| run | tensors that differ | signs that differ | seconds | seconds of the processor |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        first: Path | None = None
        for index, (name, threads, device, batch_size) in enumerate(runs):
            out = Path(directory) / str(index)
            seconds = run(args, out, threads, device, batch_size)
            first = first or out
            different, tensors, turned = compare(first, out)
            print(
                f"| {name} | {different} of {tensors} | {turned:.2%} | {seconds['wall']:.1f} | "
                f"{seconds['processor']:.1f} |",
                flush=True,
            )
            if name == args.device:
                first = out  # the second run there is compared with the first one there


if __name__ == "__main__":
    main()
