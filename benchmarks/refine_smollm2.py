"""What refinement by output gives on SmolLM2-135M-Instruct, layer by layer, and the perplexity after it.

    python benchmarks/refine_smollm2.py MODEL --device cuda --planes 1 --steps 400 --out runs/refine

MODEL is the directory of the float model. Calibration is the first 32 x 1024 tokens of WikiText-2's validation split;
perplexity is that of the second half of the same file, in windows of 2048 tokens, so that settings can be chosen by it:
the test split is not looked at. Every run prints, per layer, the held-out loss before and after (in brackets before
scales were rounded) and the seconds, and writes a JSON file with the settings and all figures. `--unseen` adds, per
layer, the error of sequences that nothing is fitted to, of first tokens and of the others, and, after the layers and
after the last pass, where the loss in the text is: by the position in the window and in the windows that are worst.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from measured import token_ids
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from walked import binarizer, make_dense

from optimum_arb import ARBConfig
from optimum_arb.calibration import CalibrationWalk, token_batches
from optimum_arb.calibration.refine import refine_layer
from optimum_arb.calibration.refine_model import refine_model
from optimum_arb.calibration.tuning import Refinement, RefineSettings
from optimum_arb.calibration.turn import LayerTurn
from optimum_arb.data import bundled_text
from optimum_arb.evaluate import perplexity
from optimum_arb.modules import select_modules


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure refinement by output on SmolLM2-135M-Instruct.")
    parser.add_argument("model", type=Path, help="directory of the float model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="directory of the JSON files")
    parser.add_argument("--name", default="run", help="name of the JSON file")
    parser.add_argument("--layers", type=int, help="binarize and refine only the first so many decoder layers")
    parser.add_argument("--method", default="arb-hrc")
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--config", type=json.loads, default={}, help="further choices of ARBConfig, as JSON")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=RefineSettings.steps, help="0: no refinement")
    parser.add_argument("--lr", type=float, default=RefineSettings.learning_rate)
    parser.add_argument("--sign-lr", type=float, default=RefineSettings.sign_learning_rate, help="0: signs stay")
    parser.add_argument("--unseen", type=int, default=0, help="further sequences that nothing is fitted to")
    parser.add_argument("--patience", type=int, default=RefineSettings.patience)
    parser.add_argument("--evaluations", type=int, default=RefineSettings.evaluations)
    parser.add_argument("--held-out", type=float, default=RefineSettings.held_out)
    parser.add_argument("--model-steps", type=int, default=0, help="steps of the last pass over the whole model")
    parser.add_argument("--model-lr", type=float, default=RefineSettings.learning_rate / 5)
    parser.add_argument("--model-sign-lr", type=float, default=0.0, help="of the last pass; 0: signs stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--targets",
        default="float",
        choices=("float", "layer"),
        help="outputs of the float model (default), or of the float layer on the binarized model's inputs",
    )
    parser.add_argument("--windows", type=int, help="windows of the perplexity (default: all of the second half)")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = token_ids(tokenizer, bundled_text("wikitext-2"))
    half = len(ids) // 2
    tokens = ids[: (args.samples + args.unseen) * args.length]
    if len(tokens) > half:
        parser.error("the calibration tokens reach into the second half of the text, on which perplexity is measured")
    choices: dict[str, Any] = {"method": args.method, **args.config}
    if args.method == "arb-hrc":
        choices["planes"] = args.planes
    config = ARBConfig(num_samples=args.samples, sequence_length=args.length, **choices)
    settings = RefineSettings(
        steps=args.steps,
        learning_rate=args.lr,
        sign_learning_rate=args.sign_lr,
        evaluations=args.evaluations,
        patience=args.patience,
        held_out=args.held_out,
        seed=args.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    selection = select_modules(model, config)
    targets = selection.modules()
    if args.layers is not None:
        targets = [name for name in targets if _layer(name) < args.layers]

    results: dict[str, Refinement] = {}
    batches = token_batches(tokens.view(-1, args.length), args.batch_size)
    unseen = range(math.ceil(args.samples / args.batch_size), len(batches))
    device = torch.device(args.device)
    text = ids[half:][: None if args.windows is None else args.windows * 2048]
    plain = None
    if args.unseen:
        model.to(device)
        plain = _losses(model, text, device)
        model.to("cpu")

    def after_layer(turn: LayerTurn) -> None:
        before = _errors(turn, unseen)
        if args.steps:
            result = results[turn.name] = refine_layer(turn, settings)
            print(
                f"{turn.name}: loss {result.before:.5f} -> {result.after:.5f} ({result.unrounded:.5f}) in "
                f"{result.steps} steps, {result.flipped:.2%} of the signs turned, {result.seconds:.1f} s",
                flush=True,
            )
        if unseen:
            figures = ", ".join(f"{b:.4f} -> {a:.4f}" for b, a in zip(before, _errors(turn, unseen), strict=True))
            print(f"{turn.name}, unseen: others, first, worst first: {figures}", flush=True)

    start = time.perf_counter()
    follow = args.targets == "float"
    walk = CalibrationWalk(
        model,
        targets,
        binarizer(selection),
        batches,
        args.device,
        after_layer=after_layer,
        follow_float=follow,
        error_correction=config.resolved_error_correction,
        held_out=len(unseen),
    )
    walk.run()
    if plain is not None:
        print("after the layers:", _where(plain, _losses(_dense(model, device), text, device)), flush=True)
    last = None
    if args.model_steps:
        if walk.chain is None:
            parser.error("--model-steps needs --targets float")
        of_model = replace(
            settings, steps=args.model_steps, learning_rate=args.model_lr, sign_learning_rate=args.model_sign_lr
        )
        used, outputs = batches[: unseen.start], walk.float_outputs[: unseen.start]
        last = refine_model(model, walk.chain, used, outputs, of_model, args.device)
        print(
            f"the model: divergence {last.before:.5f} -> {last.after:.5f} ({last.unrounded:.5f}) in "
            f"{last.steps} steps, {last.seconds:.1f} s"
        )
        if plain is not None:
            print("after the last pass:", _where(plain, _losses(_dense(model, device), text, device)), flush=True)
    seconds = time.perf_counter() - start
    bits_per_weight = make_dense(model)
    model.to(args.device)
    measured = perplexity(model, ids[half:], context_length=2048, max_windows=args.windows)
    figures = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "settings": asdict(settings),
        "layers": {name: result.to_dict() for name, result in results.items()},
        "model": None if last is None else last.to_dict(),
        "bits_per_weight": bits_per_weight,
        "seconds": seconds,
        "refinement_seconds": sum(result.seconds for result in results.values()),
        "gpu_bytes": torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else None,
        "perplexity": measured.to_dict(),
    }
    print(
        f"{bits_per_weight:.3f} true bits, {seconds:.0f} s, of which refinement {figures['refinement_seconds']:.0f} s; "
        f"perplexity {measured.perplexity:.2f} on {measured.windows} windows of the validation split's second half"
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.name}.json").write_text(json.dumps(figures, indent=1))


def _errors(turn: LayerTurn, batches: Sequence[int]) -> tuple[float, float, float]:
    """The relative squared error of the layer's outputs: of all tokens but the first, of the first, and its worst."""
    first, others = [], []
    with torch.no_grad():
        for batch in batches:
            wanted = turn.references[batch].to(turn.device).float()
            error = (turn.run(batch).float() - wanted).square().sum(-1) / wanted.square().sum(-1)
            first += error[:, 0].tolist()
            others.append(float(error[:, 1:].mean()))
    if not others:
        return (math.nan,) * 3
    return sum(others) / len(others), sum(first) / len(first), max(first)


def _dense(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in which binarized linears are float ones."""
    model = copy.deepcopy(model)
    make_dense(model)
    return model.to(device)


@torch.no_grad()
def _losses(model: nn.Module, text: torch.Tensor, device: torch.device, length: int = 2048) -> torch.Tensor:
    """The loss of each token `[windows, length - 1]`, in nats."""
    rows = []
    for window in text[: len(text) // length * length].view(-1, 1, length).to(device):
        logits = model(window, use_cache=False).logits[0, :-1].float()
        rows.append(nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").cpu())
    return torch.stack(rows)


def _where(plain: torch.Tensor, found: torch.Tensor) -> str:
    """Perplexity, and the loss above the float model's by quarters of a window, and of its worst windows."""
    above = found - plain
    quarters = ", ".join(f"{float(part.mean()):.3f}" for part in above.chunk(4, 1))
    start = above[:, :128].mean()
    worst = ", ".join(f"{value:.2f}" for value in above.mean(1).sort(descending=True).values[:6].tolist())
    return (
        f"perplexity {math.exp(float(found.mean())):.2f}; above full precision {float(above.mean()):.3f}, first 128 "
        f"{float(start):.3f}, quarters {quarters}, median window {float(above.mean(1).median()):.3f}, worst {worst}"
    )


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


if __name__ == "__main__":
    sys.exit(main())
