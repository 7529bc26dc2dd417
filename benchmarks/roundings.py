"""How far models lie apart whose fits were rounded otherwise, as on another device.

    OMP_NUM_THREADS=1 python benchmarks/roundings.py

Binarizes the tiny random models of the tests with calibration, as they are and with weights changed by 1e-6 of
themselves, and prints how the runs scatter: the greatest over the least figure, and how far the outputs of two runs lie
apart over the error of one, least and most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from optimum_arb import ARBConfig, model_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_experts import MOE, save_moe
from tiny_models import outputs, save_tiny, tokens

CHANGE = 1e-6


def changed(source: Path, out: Path, seed: int) -> Path:
    """Saves the model with its parameters changed by a relative normal error of 1e-6."""
    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + CHANGE * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return out


def turned(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """The share of packed bits that differ."""
    packed = [(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True) if a.dtype == torch.uint8]
    bits = sum(int(sum(((a ^ b) >> shift & 1).sum() for shift in range(8))) for a, b in packed)
    return bits / sum(a.numel() * 8 for a, _ in packed)


def scatter(paths: list[Path], config: dict[str, Any], ids: torch.Tensor) -> str:
    """Binarizes the models and returns the cells of a row."""
    plain = outputs(AutoModelForCausalLM.from_pretrained(paths[0]), ids)
    models = [AutoModelForCausalLM.from_pretrained(p, quantization_config=ARBConfig(**config)) for p in paths]
    found = [outputs(model, ids) for model in models]
    errors = [float((each - plain).norm()) for each in found]
    pairs = [(i, j) for i in range(len(paths)) for j in range(len(paths)) if i != j]
    apart = [float((found[i] - found[j]).norm()) / errors[j] for i, j in pairs]
    bits = [turned(models[i], models[j]) for i, j in pairs if i < j]
    reports = [model_report(model) for model in models]
    cells = [_spread(errors), f"{min(apart):.2f} to {max(apart):.2f}", f"{max(bits):.1%}"]
    for key in ("output_error", "weight_error"):
        modules = list(zip(*([getattr(m, key) for m in report.modules] for report in reports), strict=True))
        means = [sum(values) for values in zip(*modules, strict=True)]
        cells += [_spread(means), max(_spread(values) for values in modules)]
    return " | ".join(cells)


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{max(values) / min(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="How far models lie apart whose fits were rounded otherwise.")
    parser.add_argument("--runs", type=int, default=13, help="of a row")
    parser.add_argument("--experts-runs", type=int, default=7, help="of a row of a model with experts")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = ("outputs' error", "outputs apart, over their error", "bits that differ, most")
    for kind in ("output", "weight"):
        columns += (f"mean {kind} error", f"a linear's {kind} error, most")
    print(f"| model | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        llama = save_tiny(base / "llama", "LlamaForCausalLM", hidden_size=64, intermediate_size=320)
        paths = [llama, *(changed(llama, base / f"llama-{seed}", seed) for seed in range(1, args.runs))]
        for correction in (0.75, 0.0):
            for planes in (1, 2):
                config = {"dataset": tokens(16, 64), "num_samples": 16, "block_size": 64, "planes": planes}
                row = scatter(paths, {**config, "error_correction": correction}, tokens(64, 32, seed=3))
                print(f"| Llama, planes={planes}, error_correction={correction:g} | {row} |", flush=True)
        for family in MOE:
            source = save_moe(base / family, family)
            seeds = range(1, args.experts_runs)
            paths = [source, *(changed(source, base / f"{family}-{seed}", seed) for seed in seeds)]
            config = {"dataset": tokens(16, 32), "num_samples": 16, "block_size": 64}
            print(f"| {family} | {scatter(paths, config, tokens(64, 32, seed=3))} |", flush=True)


if __name__ == "__main__":
    main()
