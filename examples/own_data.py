"""Calibrates on your own texts, and measures on your own texts that nothing was fitted to.

    python examples/own_data.py MODEL TEXTS OUT

TEXTS is a text file, one document a line, or a .jsonl file whose lines have a field "text" (`--field`). Every tenth
document is held out; the perplexity of the float and of the binarized model on these is what to decide by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_arb import ARBConfig, model_report, save_model
from optimum_arb.commands.printing import table
from optimum_arb.evaluate import perplexity

HELD_OUT = 10  # every tenth document


def main() -> None:
    parser = argparse.ArgumentParser(description="Binarize a model on your own texts.")
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a float model")
    parser.add_argument("texts", metavar="TEXTS", type=Path, help="a text file, or .jsonl")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the binarized model")
    parser.add_argument("--field", default="text", help="of a .jsonl file's objects (default: text)")
    parser.add_argument("--planes", type=int, default=2, help="sign planes: 1, 2 (default) or 3")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration sequences (default: 64)")
    parser.add_argument("--sequence-length", type=int, default=512, help="their tokens (default: 512)")
    parser.add_argument("--context-length", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--max-windows", type=int, default=20, help="of the held-out texts (default: 20)")
    args = parser.parse_args()
    logging.set_verbosity_error()

    texts = read(args.texts, args.field)
    held_out = texts[::HELD_OUT]
    calibration = [text for index, text in enumerate(texts) if index % HELD_OUT]
    if not calibration:
        parser.error(f"{args.texts} holds {len(texts)} documents: at least 2 are needed, one of them to be held out.")
    print(f"{len(calibration)} documents to calibrate on, {len(held_out)} held out", flush=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = {"text": held_out, "context_length": args.context_length, "max_windows": args.max_windows}
    model = AutoModelForCausalLM.from_pretrained(args.model)
    before = perplexity(model, tokenizer, **windows)

    config = ARBConfig(
        planes=args.planes,
        dataset=calibration,
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
    after = perplexity(model, tokenizer, **windows)
    report = model_report(model)
    save_model(model, tokenizer, args.out, overwrite=True)

    print(report.summary() + "\n")
    rows = [
        ["float", "-", f"{before.perplexity:,.2f}"],
        ["binarized", f"{report.bits_per_weight:.3f}", f"{after.perplexity:,.2f}"],
    ]
    print(table(("model", "true bits", "perplexity, held out"), rows))
    print(f"{after.windows} windows of {after.context_length} tokens; saved in {args.out}")


def read(path: Path, field: str) -> list[str]:
    """The documents of a file, without empty ones."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        lines = [json.loads(line)[field] for line in lines if line.strip()]
    return [line for line in lines if line.strip()]


if __name__ == "__main__":
    main()
