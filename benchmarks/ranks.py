"""How much faster several processes binarize a model than one, and whether they make the same bits.

    python benchmarks/ranks.py --out runs/ranks                                  # one and two GPUs, 8 layers of a 7B
    python benchmarks/ranks.py --out runs/ranks --tiny --device cpu              # seconds, on a CPU

A model of random weights with outlier columns is made once in OUT and binarized from disk to disk by each number of
processes, on random tokens. Seconds are those of `quantize_checkpoint`, from the start of its first process to the
finished directory, so without the processes' own start. Prints a table, and a JSON object with --json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4},
}


def make_model(path: Path, shape: str, layers: int) -> None:
    """A Llama in bfloat16 whose inputs to each linear have columns of different sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=4096)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            outliers = torch.randperm(len(parameter))[: len(parameter) // 100]
            parameter.data[outliers] *= 20
    model.save_pretrained(path, max_shard_size="2GB")


def work(args: argparse.Namespace) -> None:
    """One process."""
    from optimum_arb import ARBConfig
    from optimum_arb.calibration.distributed import distributed
    from optimum_arb.checkpoint.quantize import quantize_checkpoint

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32000, (args.samples, args.length), generator=generator)
    choices = {"method": args.method, "num_samples": args.samples, "sequence_length": args.length}
    with distributed() as ranks:
        start = time.perf_counter()
        done = quantize_checkpoint(
            args.out / "float", args.target, ARBConfig(dataset=tokens, **choices), device=args.device, overwrite=True
        )
        seconds = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        most = max(ranks.exchange(memory, "measuring"))
        if ranks.is_first:
            errors = done.report.mean_output_error
            print(json.dumps({"seconds": seconds, "gpu_bytes": most, "output_error": errors}))


def same_bits(one: Path, other: Path) -> bool:
    """Whether two models have equal files and tensors."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    if names != sorted(path.name for path in other.glob("*.safetensors")):
        return False
    for name in names:
        with safe_open(one / name, "pt") as a, safe_open(other / name, "pt") as b:
            if sorted(a.keys()) != sorted(b.keys()):
                return False
            if not all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys()):  # noqa: SIM118
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", default="arb-hrc")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.layers = args.layers or (2 if args.tiny else 8)
    args.samples = args.samples or (16 if args.tiny else 128)
    args.length = args.length or (256 if args.tiny else 2048)
    if args.target is not None:
        work(args)
        return
    if not (args.out / "float" / "config.json").exists():
        make_model(args.out / "float", "tiny" if args.tiny else "7B", args.layers)
    results = {}
    for ranks in args.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [__file__, "--out", args.out, "--target", args.out / f"ranks-{ranks}", "--device", args.device]
        command += ["--method", args.method, "--samples", args.samples, "--length", args.length]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        results[ranks] = json.loads(done.stdout.splitlines()[-1])
        first = args.out / f"ranks-{args.ranks[0]}"
        results[ranks]["same_bits"] = same_bits(first, args.out / f"ranks-{ranks}")
    if args.json:
        print(json.dumps({"layers": args.layers, "samples": args.samples, "length": args.length, "ranks": results}))
        return
    print(
        "| processes | seconds | times as fast | GPU memory, GB | mean output error | same bits |\n" + "|---" * 6 + "|"
    )
    for ranks, found in results.items():
        speed = results[args.ranks[0]]["seconds"] / found["seconds"]
        print(
            f"| {ranks} | {found['seconds']:.1f} | {speed:.2f} | {found['gpu_bytes'] / 1e9:.2f} | "
            f"{found['output_error']:.4f} | {'yes' if found['same_bits'] else 'NO'} |"
        )


if __name__ == "__main__":
    main()
