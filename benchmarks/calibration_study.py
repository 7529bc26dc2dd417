"""How much the calibration text matters: its length, how it is cut, and what kind of text it is.

    python benchmarks/calibration_study.py MODEL --device cuda --out runs/calibration

MODEL is a directory with a float model and its tokenizer. Every row binarizes it with another calibration set and
measures perplexity on two texts, in windows of 2048 tokens without overlap: the second half of WikiText-2's validation
split, and the second half of Python's reference documentation (`pydoc_data.topics`, which comes with Python and differs
a little between its versions). Calibration sets are of the first halves; the test split is never looked at. Rows:

- number: 8 to 128 sequences of 1024 tokens of the validation split;
- length: 32,768 tokens of it as sequences of 256, 512, 1024 or 2048;
- kind: 32 sequences of 1024 tokens of it, of the documentation, of both in turns, or of tokens drawn at random.

A row is named KIND-SEQUENCESxLENGTH, and `--rows` takes any such name. A model that was trained on the first part of
the validation split (`tiny_families.py`) needs `--skip 0.8`: then the two halves are those of the rest.

Every row is written to a JSON file of its own as soon as it is measured; a second run goes on after the last of them.
`--jobs 6` measures six rows at a time, each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measured import binarized, read_row, token_ids, write_row
from transformers import AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.data import bundled_text
from optimum_arb.evaluate import perplexity

KINDS = ("wikitext", "python-docs", "mixed", "random")
FULL = "full-precision"


class Calibration(NamedTuple):
    """A calibration set: `samples` sequences of `length` tokens of a kind of text."""

    kind: str
    samples: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.samples}x{self.length}"

    @classmethod
    def parse(cls, name: str) -> Calibration:
        """That of a name.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(rf"({'|'.join(KINDS)})-([1-9]\d*)x([1-9]\d*)", name)
        if found is None:
            raise ValueError(f"{name!r} is no row: KIND-SEQUENCESxLENGTH, KIND being one of {', '.join(KINDS)}.")
        return cls(found[1], int(found[2]), int(found[3]))


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


class Texts(NamedTuple):
    """Token ids int64 `[T]` of a half of each text."""

    wikitext: torch.Tensor
    documentation: torch.Tensor

    def by_name(self) -> dict[str, torch.Tensor]:
        return {"wikitext": self.wikitext, "python-docs": self.documentation}


def halves(tokenizer: Any, skip: float) -> tuple[Texts, Texts]:
    """The texts to calibrate on and those to measure on, which share nothing.

    Args:
        tokenizer: of the model.
        skip: fraction of the characters of the validation split that is not used.
    """
    text = bundled_text("wikitext-2")
    start = text.index("\n", int(skip * len(text))) + 1 if skip else 0
    whole = Texts(
        token_ids(tokenizer, text[start:]),
        token_ids(tokenizer, python_documentation()),
    )
    first, second = ([part[: len(part) // 2] for part in whole], [part[len(part) // 2 :] for part in whole])
    return Texts(*first), Texts(*second)


def calibration_set(calibration: Calibration, texts: Texts, vocabulary: int) -> torch.Tensor:
    """The token ids int64 `[samples, length]`.

    Args:
        calibration: which one.
        texts: to calibrate on.
        vocabulary: token ids of the random kind are below this.

    Raises:
        ValueError: a text is too short.
    """
    kind, samples, length = calibration
    if kind == "random":
        return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    if kind == "mixed":
        both = [_cut(part, -(-samples // 2), length, calibration.name) for part in texts]
        return torch.stack(both, 1).flatten(0, 1)[:samples].contiguous()
    return _cut(texts.by_name()[kind], samples, length, calibration.name)


def _cut(tokens: torch.Tensor, samples: int, length: int, name: str) -> torch.Tensor:
    if len(tokens) < samples * length:
        raise ValueError(f"{name}: the text to calibrate on has {len(tokens):,} tokens, not {samples} x {length}.")
    return tokens[: samples * length].view(samples, length)


def perplexities(model: torch.nn.Module, evaluation: Texts, length: int, windows: int) -> dict[str, Any]:
    """Of each text."""
    return {
        name: perplexity(model, tokens, context_length=length, max_windows=windows).to_dict()
        for name, tokens in evaluation.by_name().items()
    }


def measure(args: argparse.Namespace, tokens: torch.Tensor | None, evaluation: Texts) -> dict[str, Any]:
    """One row; without tokens that of the model as it is."""
    config = None
    if tokens is not None:
        samples, length = tokens.shape
        config = ARBConfig(**{"dataset": tokens, "num_samples": samples, "sequence_length": length, **args.config})
    model, figures = binarized(args.model, config, args.device)
    if config is not None:
        figures["config"] = report_config(config)
    found = perplexities(model, evaluation, args.context_length, args.windows)
    return {**figures, "perplexity": found, "device": args.device}


def report_config(config: ARBConfig) -> dict[str, Any]:
    """The choices of how to binarize, without the tokens."""
    return {key: value for key, value in config.choices().items() if value is not None}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| calibration text | sequences | tokens each | true bits | output error on it | perplexity of WikiText-2 | of "
        "Python's documentation | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        values = " | ".join(f"{found['perplexity']:,.2f}" for found in row["perplexity"].values())
        if name == FULL:
            lines.append(f"| (full precision) | - | - | - | - | {values} | - |")
            continue
        kind, samples, length = row["calibration"]
        lines.append(
            f"| {kind} | {samples} | {length} | {row['bits_per_weight']:.3f} | {row['output_error']:.4f} | "
            f"{values} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def stored(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """A row that was measured by an earlier run in the same way, or None."""
    row = read_row(args.out / f"{name}.json")
    return row if row is not None and all(row.get(key) == value for key, value in settings(args).items()) else None


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows of a table have in common."""
    return {
        "model": str(args.model),
        "choices": args.config,
        "context_length": args.context_length,
        "windows": args.windows,
        "skip": args.skip,
    }


def measure_rows(names: list[str], args: argparse.Namespace) -> None:
    """Measures rows one after the other and writes each.

    Raises:
        ValueError: a text is too short; no row is measured then.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, evaluation = halves(tokenizer, args.skip)
    sets = {
        name: None if name == FULL else calibration_set(Calibration.parse(name), texts, len(tokenizer))
        for name in names
    }
    for name, tokens in sets.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = {"row": name, **settings(args), **measure(args, tokens, evaluation)}
        if name != FULL:
            row["calibration"] = Calibration.parse(name)
        write_row(args.out / f"{name}.json", row)
        print(markdown({name: row}).splitlines()[-1], file=sys.stderr, flush=True)
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()


def measure_in_processes(names: list[str], jobs: int, argv: list[str]) -> None:
    """As `measure_rows`, so many rows at a time; a row that fails says so itself."""

    def measured(name: str) -> None:
        # of options given twice the last one counts
        command = [sys.executable, __file__, *argv, "--rows", name, "--jobs", "1"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(measured, names))


def main(argv: list[str] | None = None) -> None:
    default = [FULL, *(calibration.name for calibration in calibrations())]
    parser = argparse.ArgumentParser(description="Measure how much the calibration text matters.")
    parser.add_argument("model", type=Path, help="directory of a float model with its tokenizer")
    parser.add_argument("--device", default="cpu", help="where everything runs: cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"), help="directory of the JSON files")
    parser.add_argument(
        "--rows",
        default=",".join(default),
        help=f"{FULL} and KIND-SEQUENCESxLENGTH, ... (default: {','.join(default)})",
    )
    parser.add_argument(
        "--config", type=json.loads, default={}, help="choices of ARBConfig as JSON, such as '{\"planes\": 2}'"
    )
    parser.add_argument("--context-length", type=int, default=2048, help="tokens of a window (default: 2048)")
    parser.add_argument("--windows", type=int, default=30, help="windows of each text to measure (default: 30)")
    parser.add_argument("--skip", type=float, default=0.0, help="fraction of the validation split to leave out")
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at a time, each in a process (default: 1)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    names = args.rows.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            if name != FULL:
                Calibration.parse(name)
        missing = [name for name in names if stored(name, args) is None]
        if args.jobs > 1 and len(missing) > 1:
            measure_in_processes(missing, args.jobs, argv)
        elif missing:
            measure_rows(missing, args)
    except ValueError as error:
        parser.error(str(error))
    rows = {name: row for name in names if (row := stored(name, args)) is not None}
    print(markdown(rows))
    if len(rows) < len(names):
        sys.exit(f"Not measured, see above: {', '.join(name for name in names if name not in rows)}.")


if __name__ == "__main__":
    main()
