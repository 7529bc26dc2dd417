"""Whether memory grows: a binarized model is loaded, generates and is let go of, many times in one process.

    python benchmarks/cycles.py --cycles 1000
    python benchmarks/cycles.py MODEL --cycles 20 --device cuda

Without MODEL a tiny random Llama is binarized first, so that a thousand cycles take minutes. "modules" are the packed
layers of former cycles that still exist, with Python's collector of reference cycles off: a model is to go when the
last reference to it goes. Memory is the process's resident set, in MB, "with the model" before a cycle lets go of it
and "resident" after, and on a GPU what torch has allocated there; before the latter two are read the collector runs,
for the garbage of others (a thousand loads of a float model leave some too).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from random_llama import random_llama
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from optimum_arb import ARBConfig
from optimum_arb.nn import ARBLinear


@dataclass
class Sample:
    """What was measured after a number of cycles: bytes, and packed layers of former cycles that still exist."""

    cycle: int
    loaded: int  # before the model of this cycle was let go of
    resident: int
    on_device: int
    modules: int


def tiny_llama(directory: Path) -> Path:
    """A random Llama of 200k weights, binarized at two planes without calibration; returns `directory / "packed"`."""
    random_llama(max_position_embeddings=64).save_pretrained(directory / "float")
    packed = AutoModelForCausalLM.from_pretrained(
        directory / "float", quantization_config=ARBConfig(planes=2, dataset=None)
    )
    packed.save_pretrained(directory / "packed")
    return directory / "packed"


def resident() -> int:
    """Bytes of the process in memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not say how much memory the process has.")


def run_cycles(model: Path | str, cycles: int, every: int, device: str = "cpu", tokens: int = 4) -> list[Sample]:
    """Loads, generates and lets go of a model `cycles` times; a sample after the first and each `every` cycles."""
    samples = []
    layers: list[weakref.ref] = []
    prompt = torch.arange(5, 13)[None].to(device)
    expected = None
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for cycle in range(1, cycles + 1):
            loaded = AutoModelForCausalLM.from_pretrained(model, device_map=device)
            out = loaded.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).tolist()
            expected = expected or out
            if out != expected:
                raise AssertionError(f"cycle {cycle} generated {out}, the first {expected}")
            loaded_bytes = resident() if cycle == 1 or cycle % every == 0 else 0
            layers += [weakref.ref(module) for module in loaded.modules() if isinstance(module, ARBLinear)]
            del loaded
            layers = [layer for layer in layers if layer() is not None]
            if cycle == 1 or cycle % every == 0:
                gc.collect()
                on_device = torch.cuda.memory_allocated() if device != "cpu" else 0
                samples.append(Sample(cycle, loaded_bytes, resident(), on_device, len(layers)))
    finally:
        if was_enabled:
            gc.enable()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory over cycles of loading, generating and letting go.")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or tiny_llama(Path(directory))
        samples = run_cycles(model, args.cycles, args.every, args.device)
    print(f"torch {torch.__version__}, {args.device}")
    print("| cycles | with the model, MB | resident MB | on the device MB | modules |")
    print("|---|---|---|---|---|")
    for sample in samples:
        memory = (sample.loaded, sample.resident, sample.on_device)
        print(f"| {sample.cycle} | {' | '.join(f'{value / 1e6:.1f}' for value in memory)} | {sample.modules} |")


if __name__ == "__main__":
    main()
