"""The methods on small trained models of families other than Llama's, with the settings that SmolLM2 is binarized with.

    OMP_NUM_THREADS=1 python benchmarks/second_family.py --out runs/second-family
    python benchmarks/second_family.py --device cuda --out runs/second-family

Trains a small GPT-2 and a small GPT-NeoX (`tiny_families.py`) on the first 80 % of WikiText-2's validation split, or
takes those that OUT has; binarizes them, calibrated on the first 128 x 256 tokens of the next 10 %; and measures
perplexity on the last 10 %, in all windows of 256 tokens without overlap, all in float32. No part is in two of these.
The test split is not used. Nothing is chosen here: every row has its method's default settings, or says what it has.

Every row is written to a JSON file of its own as soon as it is measured; a second run goes on after the last of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import binarized, read_row, token_ids, write_row
from tiny_families import CONTEXT_LENGTH, FAMILIES, split_text, trained
from transformers import AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.evaluate import perplexity

SAMPLES = 128
FULL = "full-precision"


def configurations(refine_steps: int | None = None) -> dict[str, Callable[[torch.Tensor], ARBConfig] | None]:
    """Row name -> what makes the configuration of calibration tokens int64 `[samples, length]`; None is full precision.

    Args:
        refine_steps: of the refined row; None is the default.
    """

    def published(method: str) -> Callable[[torch.Tensor], ARBConfig]:
        return lambda tokens: ARBConfig.as_published(method, **_calibration(tokens))

    def ours(**choices: Any) -> Callable[[torch.Tensor], ARBConfig]:
        return lambda tokens: ARBConfig(**choices, **_calibration(tokens))

    rows: dict[str, Callable[[torch.Tensor], ARBConfig] | None] = {
        FULL: None,
        "rtn": lambda _: ARBConfig(method="rtn", block_size=-1, dataset=None),
        "billm": published("billm"),
        "arb-rc": published("arb-rc"),
        "arb-rc-exact": ours(method="arb-rc"),
    }
    for name, choices in {
        "arb-hrc-1": {"planes": 1},
        "arb-dbf-1.18": {"method": "arb-dbf", "factor_bits": 1.18},
        "arb-hrc-2": {"planes": 2},
        "arb-dbf-2.3": {"method": "arb-dbf", "factor_bits": 2.3},
    }.items():
        rows[f"{name}-uncorrected"] = ours(error_correction=0, **choices)
        rows[name] = ours(**choices)
    rows["arb-hrc-1-refined"] = ours(planes=1, refine="block", refine_steps=refine_steps)
    return rows


def _calibration(tokens: torch.Tensor) -> dict[str, Any]:
    return {"dataset": tokens, "num_samples": tokens.shape[0], "sequence_length": tokens.shape[1]}


def calibration_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """The first tokens of the calibration part, int64 `[SAMPLES, CONTEXT_LENGTH]`.

    Raises:
        ValueError: the part is shorter.
    """
    if len(tokens) < SAMPLES * CONTEXT_LENGTH:
        raise ValueError(f"The calibration part has {len(tokens):,} tokens, not {SAMPLES} x {CONTEXT_LENGTH}.")
    return tokens[: SAMPLES * CONTEXT_LENGTH].view(SAMPLES, CONTEXT_LENGTH)


def unigram_perplexity(training: torch.Tensor, evaluation: torch.Tensor, vocabulary: int) -> float:
    """Of tokens predicted by how often they occur in the training part (each counted once more): what a model that
    knows nothing of order has."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[evaluation].mean()))


def measure(source: Path, config: ARBConfig | None, evaluation: torch.Tensor, device: str) -> dict[str, Any]:
    """One row."""
    model, figures = binarized(source, config, device)
    result = perplexity(model, evaluation, context_length=CONTEXT_LENGTH, batch_size=8)
    return {**figures, "perplexity": result.to_dict(), "device": device, "threads": torch.get_num_threads()}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The rows of one family as a table; losses are in nats a token, above full precision where that is measured."""
    lines = ["| method | true bits | perplexity | loss above full precision | seconds |", "|---|---|---|---|---|"]
    loss = {name: row["perplexity"]["negative_log_likelihood"] for name, row in rows.items()}
    for name, row in rows.items():
        bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else "-"
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        above = f"{loss[name] - loss[FULL]:.4f}" if FULL in rows and name != FULL else "-"
        lines.append(f"| {name} | {bits} | {row['perplexity']['perplexity']:,.2f} | {above} | {seconds} |")
    return "\n".join(lines)


def study(out: Path, family: str, names: list[str], args: argparse.Namespace) -> None:
    """Measures the rows of a family that `out` does not have, and prints its table."""
    source = out / "model"
    training = trained(source, family, args.steps, args.device, args.bfloat16, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    parts = [token_ids(tokenizer, part) for part in split_text()]
    tokens, evaluation = calibration_tokens(parts[1]), parts[2]
    known = configurations(args.refine_steps)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        path = out / f"{name}.json"
        row = read_row(path)
        if row is None or row["training"] != training or row["refine_steps"] != args.refine_steps:
            print(f"{family}, {name} ...", file=sys.stderr, flush=True)
            make = known[name]
            row = {
                "row": name,
                "training": training,
                "refine_steps": args.refine_steps,
                **measure(source, None if make is None else make(tokens), evaluation, args.device),
            }
            write_row(path, row)
        rows[name] = row
        print(markdown({name: row}).splitlines()[-1], file=sys.stderr, flush=True)
    unigrams = unigram_perplexity(parts[0], evaluation, len(tokenizer))
    print(
        f"{family}: {training['parameters']:,} parameters, trained on {training['tokens_seen']:,} tokens drawn from "
        f"{len(parts[0]):,} in {training['seconds']:.0f} s ({training['device']}); calibrated on {tokens.numel():,} "
        f"of {len(parts[1]):,} tokens, measured on {len(evaluation):,}, where unigrams have a perplexity of "
        f"{unigrams:,.1f}\n\n{markdown(rows)}\n",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    known = configurations()
    parser = argparse.ArgumentParser(description="Measure the methods on small trained models of other families.")
    parser.add_argument("--out", type=Path, default=Path("runs/second-family"), help="directory of models and rows")
    parser.add_argument("--families", default="gpt2,gpt-neox", help=f"of {','.join(FAMILIES)}")
    parser.add_argument("--rows", default=",".join(known), help=f"of {','.join(known)}")
    parser.add_argument("--refine-steps", type=int, help="of the refined row (default: as ARBConfig has it)")
    parser.add_argument("--steps", type=int, default=500, help="of 4 windows of 256 tokens (default: 500)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast: faster where a CPU has AMX")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    families, names = args.families.split(","), args.rows.split(",")
    for kind, chosen, possible in (("family", families, set(FAMILIES)), ("row", names, set(known))):
        unknown = sorted(set(chosen) - possible)
        if unknown:
            parser.error(f"unknown {kind} {unknown[0]!r}: choose of {', '.join(possible)}")
    for family in families:
        study(args.out / family, family, names, args)


if __name__ == "__main__":
    main()
