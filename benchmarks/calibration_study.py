"""How much the calibration text matters: its length, how it is cut, and what kind of text it is.

    python benchmarks/calibration_study.py MODEL --device cuda --out runs/calibration

MODEL is a directory with a float model and its tokenizer. Every row binarizes it with another calibration set and
measures perplexity on the second half of WikiText-2's validation split, in windows of 2048 tokens without overlap; the
test split is never looked at. Rows:

- number: 8 to 128 sequences of 1024 tokens of the first half of the validation split;
- length: 32,768 tokens of it as sequences of 256, 512, 1024 or 2048;
- kind: 32 sequences of 1024 tokens of it, of Python's reference documentation (`pydoc_data.topics`, which comes with
  Python), of both in turns, or of tokens drawn at random.

Every row is written to a JSON file of its own as soon as it is measured; a second run goes on after the last of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.data import bundled_text
from optimum_arb.evaluate import perplexity
from optimum_arb.report import model_report

CONTEXT_LENGTH = 2048
KINDS = ("wikitext", "python-docs", "mixed", "random")


class Calibration(NamedTuple):
    """A calibration set: `samples` sequences of `length` tokens of a kind of text."""

    kind: str
    samples: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.samples}x{self.length}"


def calibrations() -> list[Calibration]:
    """The rows of the study."""
    number = [Calibration("wikitext", samples, 1024) for samples in (8, 16, 32, 64, 128)]
    length = [Calibration("wikitext", 32768 // length, length) for length in (256, 512, 2048)]
    kind = [Calibration(kind, 32, 1024) for kind in KINDS[1:]]
    return number + length + kind


def python_documentation() -> str:
    """The language reference that Python ships for `help()`: about 0.7 MB of technical English with code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_tokens(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 `[T]`, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_set(
    calibration: Calibration, wikitext: torch.Tensor, tokenizer: Any, vocabulary: int
) -> torch.Tensor | None:
    """The token ids int64 `[samples, length]`; None where the text is too short.

    Args:
        calibration: which one.
        wikitext: tokens of the text to calibrate on, int64 `[T]`.
        tokenizer: of the model.
        vocabulary: token ids of the random kind are below this.
    """
    kind, samples, length = calibration
    if kind == "random":
        return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    if kind == "mixed":
        other = text_tokens(tokenizer, python_documentation())
        halves = [_cut(part, -(-samples // 2), length) for part in (wikitext, other)]
        if halves[0] is None or halves[1] is None:
            return None
        return torch.stack([halves[0], halves[1]], 1).flatten(0, 1)[:samples].contiguous()
    return _cut(wikitext if kind == "wikitext" else text_tokens(tokenizer, python_documentation()), samples, length)


def _cut(tokens: torch.Tensor, samples: int, length: int) -> torch.Tensor | None:
    return tokens[: samples * length].view(samples, length) if len(tokens) >= samples * length else None


def measure(
    source: Path, tokens: torch.Tensor, evaluation: torch.Tensor, choices: dict[str, Any], device: str, windows: int
) -> dict[str, Any]:
    """One row."""
    config = ARBConfig(
        **{"dataset": tokens, "num_samples": tokens.shape[0], "sequence_length": tokens.shape[1], **choices}
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, device_map=device, quantization_config=config
    )
    seconds = time.perf_counter() - start
    report = model_report(model)
    # the dense weights are the same numbers; multiplying by them is faster than by the packed ones
    model = model.dequantize().to(device)
    result = perplexity(model, evaluation, context_length=CONTEXT_LENGTH, max_windows=windows, progress=True)
    return {
        "config": report_config(config),
        "bits_per_weight": report.bits_per_weight,
        "output_error": report.mean_output_error,
        "seconds": seconds,
        "perplexity": result.to_dict(),
        "device": device,
    }


def report_config(config: ARBConfig) -> dict[str, Any]:
    """The choices of how to binarize, without the tokens."""
    return {key: value for key, value in config.choices().items() if value is not None}


def full_precision(source: Path, evaluation: torch.Tensor, device: str, windows: int) -> dict[str, Any]:
    """The row of the model as it is."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map=device)
    result = perplexity(model, evaluation, context_length=CONTEXT_LENGTH, max_windows=windows, progress=True)
    return {"perplexity": result.to_dict(), "device": device}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| calibration text | sequences | tokens each | true bits | output error on it | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        value = row["perplexity"]["perplexity"]
        if "calibration" not in row:
            lines.append(f"| ({name}) | - | - | - | - | {value:,.2f} | - |")
            continue
        kind, samples, length = row["calibration"]
        lines.append(
            f"| {kind} | {samples} | {length} | {row['bits_per_weight']:.3f} | {row['output_error']:.4f} | "
            f"{value:,.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    known = {calibration.name: calibration for calibration in calibrations()}
    parser = argparse.ArgumentParser(description="Measure how much the calibration text matters.")
    parser.add_argument("model", type=Path, help="directory of a float model with its tokenizer")
    parser.add_argument("--device", default="cpu", help="where everything runs: cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"), help="directory of the JSON files")
    parser.add_argument("--rows", default=",".join(known), help=f"of {','.join(known)}")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="choices of ARBConfig as JSON, such as '{\"planes\": 2}'"
    )
    parser.add_argument("--windows", type=int, default=30, help="windows of 2048 tokens to measure (default: 30)")
    args = parser.parse_args()
    names = args.rows.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: the rows are {', '.join(known)}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = text_tokens(tokenizer, bundled_text("wikitext-2"))
    wikitext, evaluation = text[: len(text) // 2], text[len(text) // 2 :]
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in ["full-precision", *names]:
        path = args.out / f"{name}.json"
        row = json.loads(path.read_text()) if path.is_file() else None
        if row is None or row["choices"] != args.config or row["windows"] != args.windows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            if name == "full-precision":
                row = full_precision(args.model, evaluation, args.device, args.windows)
            else:
                tokens = calibration_set(known[name], wikitext, tokenizer, len(tokenizer))
                if tokens is None:
                    print(f"{name}: the text is shorter than that, left out.", file=sys.stderr, flush=True)
                    continue
                row = measure(args.model, tokens, evaluation, args.config, args.device, args.windows)
                row["calibration"] = known[name]
            row = {"row": name, "choices": args.config, "windows": args.windows, **row}
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(row, indent=1))
            os.replace(unfinished, path)
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
        rows[name] = row
        print(markdown({name: row}).splitlines()[-1], file=sys.stderr, flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
