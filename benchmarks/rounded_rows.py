"""How many rows of real weights are stored as round-to-nearest, because the method's fit of them is worse.

    python benchmarks/rounded_rows.py MODEL --layers 0 15

MODEL is a directory with a float model and its tokenizer. The linears of some layers are fitted under `X^T X` of the
float model on the first 8 x 512 tokens of WikiText-2's validation split, and without calibration. Told are the rows in
which round-to-nearest with the same blocks has less error (`optimum_arb.algorithms.guard`), the share of the time that
looking for them takes, and the least and the greatest error of a weight over that of round-to-nearest.
"""

from __future__ import annotations

import argparse
import time
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb import ARBConfig, algorithms
from optimum_arb.algorithms import guard
from optimum_arb.config import BITMAP_METHODS
from optimum_arb.data import bundled_text
from optimum_arb.format.packing import BinarizedWeight
from optimum_arb.modules import is_linear

FORMS = {
    **{method: {"method": method} for method in BITMAP_METHODS},
    "billm, no bitmap": {"method": "billm", "group_bitmap": "none", "salient_columns": 0},
    "arb-rc, no bitmap": {"method": "arb-rc", "group_bitmap": "none", "salient_columns": 0},
}


class Watch:
    """Stands in for `no_worse_than_rounding` and remembers what it did."""

    def __init__(self) -> None:
        self.rows = self.worse = self.changed = self.fits = 0
        self.seconds = 0.0
        self.ratios: list[float] = []

    def __call__(self, target: torch.Tensor, fit: BinarizedWeight, *args) -> BinarizedWeight:
        start = time.perf_counter()
        found = guard.no_worse_than_rounding(target, fit, *args)
        self.seconds += time.perf_counter() - start
        lost = guard.row_errors(target, fit, *args)
        bound = guard.row_errors(target, guard.as_rounded(target, fit, args[0]), *args)
        self.rows, self.worse = self.rows + len(lost), self.worse + int((lost > bound).sum())
        self.fits, self.changed = self.fits + 1, self.changed + (found is not fit)
        self.ratios.append(float(lost.sum() / bound.sum()))
        return found


@torch.no_grad()
def calibrate(directory: str, layers: list[int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and `X^T X` of the linears of some layers, by name."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer(bundled_text("wikitext-2")[:100_000], return_tensors="pt").input_ids[:, : 8 * 512].view(8, 512)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str):
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _) -> None:
            x = inputs[0].flatten(0, -2).float()
            weight, hessian = found.get(name, (module.weight, torch.zeros(x.shape[1], x.shape[1])))
            found[name] = weight, hessian + x.T @ x

        return hook

    for name, module in model.named_modules():
        if is_linear(module) and any(f"layers.{layer}." in name for layer in layers):
            module.register_forward_hook(watch(name))
    for rows in tokens.split(2):
        model(rows)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of real weights that are stored as round-to-nearest.")
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, nargs="+", default=[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    linears = calibrate(args.model, args.layers)
    print("| method | calibrated | rows that round-to-nearest meets better | weights changed | error over its | time |")
    print("|---|---|---|---|---|---|")
    for name in args.forms:
        for calibrated in (True, False):
            watch, start = Watch(), time.perf_counter()
            choices = FORMS[name] if calibrated else {**FORMS[name], "dataset": None}
            with patch.object(algorithms, "no_worse_than_rounding", watch):
                for weight, hessian in linears.values():
                    algorithms.binarize(weight, hessian if calibrated else None, ARBConfig(**choices))
            share = watch.seconds / (time.perf_counter() - start - watch.seconds)
            print(
                f"| {name} | {'yes' if calibrated else 'no'} | {watch.worse} of {watch.rows:,} | {watch.changed} of "
                f"{watch.fits} | {min(watch.ratios):.3f} to {max(watch.ratios):.3f} | {share:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
