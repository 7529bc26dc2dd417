"""Measure models: perplexity, divergence from a baseline, memory, latency, energy, samples; with a report to look at.

Without a baseline and without --measure, the perplexity of one model. With a baseline everything, each model beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .printing import fields, json_text, size, table

if TYPE_CHECKING:
    from ..evaluate.settings import Settings

EXAMPLES = """\
  %(prog)s smollm2-arb
  %(prog)s smollm2-arb --baseline HuggingFaceTB/SmolLM2-135M-Instruct --max-windows 10 --report report.html
  %(prog)s one-plane two-planes --baseline my-model --measure perplexity,divergence,memory --report results/
  %(prog)s my-model-arb --baseline my-model --measure latency,energy --batch-sizes 1,4,16 --price-per-hour 2.5
  %(prog)s smollm2-arb --text my-held-out-text.txt --context-length 1024 --max-windows 10 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="+", help="directory or Hub name of a causal language model")
    parser.add_argument("--baseline", metavar="BASE", help="the model that they were made from, to measure them beside")
    parser.add_argument(
        "--measure",
        metavar="LIST",
        help="of perplexity, divergence, generation, memory, latency, energy; or all (default: perplexity; with "
        "--baseline all)",
    )
    parser.add_argument("--leave-out", metavar="LIST", help="of these, what not to measure")
    parser.add_argument(
        "--report",
        action="append",
        default=[],
        metavar="PATH",
        help="write a report: .html (needs matplotlib), .md or .json, or a directory for all three; may be repeated",
    )
    parser.add_argument("--compare", metavar="DIR", help="results of compare, for the plot of perplexity against bits")
    parser.add_argument(
        "--max-perplexity", type=float, metavar="X", help="exit with 1 where the perplexity of a model is above this"
    )
    parser.add_argument(
        "--record", action="store_true", help="write the result into MODEL, a binarized one's directory, and its card"
    )
    add_measuring_arguments(parser)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of which `build_settings` makes the settings of an evaluation."""
    text = parser.add_argument_group("predictions")
    text.add_argument(
        "--text",
        action="append",
        metavar="NAME_OR_PATH",
        help="a text file, or a bundled text (default: wikitext-2-test); with a report, may be repeated",
    )
    text.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="tokens of a window (default: 2048, or the model's positions if they are fewer)",
    )
    text.add_argument("--max-windows", type=int, metavar="N", help="measure only the first N windows")
    text.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows of a forward pass (default: 1)")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'optimum-arb[eval]')")
    tasks.add_argument("--tasks", metavar="LIST", help="names, e.g. arc_easy,piqa")
    tasks.add_argument("--include-path", metavar="DIR", help="where the YAML files of your own tasks lie")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to continue; may be repeated")
    samples.add_argument("--sample-tokens", type=int, default=48, metavar="N", help="at most so many (default: 48)")
    samples.add_argument("--chat", action="store_true", help="put the prompts into the model's chat template")
    speed = parser.add_argument_group("speed, memory, energy, cost")
    speed.add_argument("--batch-sizes", default="1,4", metavar="LIST", help="sequences at a time (default: 1,4)")
    speed.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of a prompt (default: 128)")
    speed.add_argument("--new-tokens", type=int, default=32, metavar="N", help="generated after it (default: 32)")
    speed.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds; medians are told (default: 5)")
    speed.add_argument("--static-cache", action="store_true", help="generate with a static cache (compiled on a GPU)")
    speed.add_argument("--energy-seconds", type=float, default=5.0, metavar="S", help="for each model (default: 5)")
    speed.add_argument("--price-per-hour", type=float, metavar="X", help="of the machine, for the cost of tokens")
    speed.add_argument("--currency", default="USD", metavar="NAME", help="of the price (default: USD)")
    loading = parser.add_argument_group("loading")
    loading.add_argument("--backend", metavar="NAME", help="how a binarized model computes (default: auto)")
    loading.add_argument("--dtype", default="auto", help="auto (the checkpoint's own, default), float32, bfloat16, ...")
    loading.add_argument("--device-map", default="cpu", metavar="MAP", help="cpu (default), cuda, auto, ...")
    loading.add_argument("--seed", type=int, default=0, metavar="N", help="of torch (default: 0)")


def build_settings(args: argparse.Namespace, parts: tuple[str, ...]) -> Settings:
    """The settings of the options.

    Raises:
        ValueError: a list of numbers that is none.
    """
    from ..evaluate.generation import PROMPTS
    from ..evaluate.settings import Settings

    try:
        batch_sizes = tuple(int(size) for size in args.batch_sizes.split(","))
    except ValueError:
        raise ValueError(f"--batch-sizes {args.batch_sizes!r} is no list of numbers, such as 1,4,16.") from None
    same = (
        "context_length", "max_windows", "batch_size", "include_path", "limit", "sample_tokens", "chat",
        "prompt_tokens", "new_tokens", "repeats", "static_cache", "energy_seconds", "price_per_hour", "currency",
        "dtype", "device_map", "backend", "seed",
    )  # fmt: skip
    return Settings(
        parts=parts,
        texts=tuple(args.text or ["wikitext-2-test"]),
        tasks=tuple(task for task in (args.tasks or "").split(",") if task),
        prompts=tuple(args.prompt or PROMPTS),
        batch_sizes=batch_sizes,
        **{name: getattr(args, name) for name in same},
    )


def chosen_parts(
    measure: str | None, leave_out: str | None, baseline: str | None, tasks: str | None
) -> tuple[str, ...]:
    """What to measure.

    Args:
        measure: the option: names, or "all".
        leave_out: the option: names.
        baseline: the baseline, if there is one.
        tasks: the option of that name, which asks for the tasks.

    Raises:
        ValueError: an unknown name, or nothing is left.
    """
    from ..evaluate.settings import PARTS

    possible = [part for part in PARTS if part != "tasks" and (baseline is not None or part != "divergence")]
    wanted, left_out = (
        [name.strip() for name in (text or "").split(",") if name.strip()] for text in (measure, leave_out)
    )
    for option, names, known in (("measure", wanted, (*PARTS, "all")), ("leave-out", left_out, PARTS)):
        for name in names:
            if name not in known:
                raise ValueError(f"--{option} {name!r} is nothing that can be measured: use {', '.join(known)}.")
    if "all" in wanted or (not wanted and baseline is not None):
        wanted = possible
    found = {*(wanted or ["perplexity"]), *(["tasks"] if tasks else [])} - set(left_out)
    if not found:
        raise ValueError("--leave-out leaves nothing to measure.")
    return tuple(part for part in PARTS if part in found)


def run(args: argparse.Namespace) -> int:
    parts = chosen_parts(args.measure, args.leave_out, args.baseline, args.tasks)
    build_settings(args, parts).check()
    if args.max_perplexity is not None and math.isnan(args.max_perplexity):
        raise ValueError("--max-perplexity nan is no bound: give a number.")
    simple = parts == ("perplexity",) and not args.report and args.baseline is None
    if simple and len(args.model) == 1 and len(args.text or [""]) == 1 and args.compare is None:
        return run_perplexity(args)
    return run_evaluation(args, parts)


def run_evaluation(args: argparse.Namespace, parts: tuple[str, ...]) -> int:
    """Everything, beside the baseline."""
    from ..evaluate.evaluation import comparison_rows, evaluate, read_comparison
    from ..evaluate.report_files import report_paths, write_reports

    if args.record:
        raise ValueError("--record goes with the perplexity of one model alone: run evaluate MODEL --record.")
    if args.max_perplexity is not None and "perplexity" not in parts:
        raise ValueError("--max-perplexity needs the perplexity, which is not measured.")
    paths = report_paths(args.report)
    if args.compare is not None:
        comparison_rows(args.compare)  # told before hours of measuring
    report = evaluate(
        args.model,
        args.baseline,
        build_settings(args, parts),
        progress=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
        bars=not args.json,
    )
    comparison = None if args.compare is None else read_comparison(args.compare, report)
    write_reports(report, paths, comparison)
    measured = [row["perplexity"] for m in report["models"] if m["role"] == "model" for row in m.get("perplexity", [])]
    limit = args.max_perplexity
    failed = limit is not None and not all(value <= limit for value in measured)
    if args.json:
        print(json_text(report))
    else:
        print(describe(report, paths))
        if limit is not None:
            print(f"check  {'above' if failed else 'at most'} {limit:,.2f}")
    return int(failed)


def describe(report: dict[str, Any], paths: list[Path]) -> str:
    """The readable form."""
    from ..evaluate.report_tables import summary, tables
    from ..layer_warnings import LayerWarning, warning_lines

    parts = []
    for found in tables(report).values():
        parts.append(f"{found.title}\n\n{table(found.headers, found.rows)}" + (f"\n{found.note}" if found.note else ""))
    samples = [model for model in report["models"] if model.get("generation")]
    for index, first in enumerate(samples[0]["generation"] if samples else []):
        lines = [(model["label"], " ".join(model["generation"][index]["text"].split())) for model in samples]
        parts.append(fields([("prompt", first["prompt"]), *lines]))
    for model in report["models"]:
        found_broken = [LayerWarning(**warning) for warning in model.get("warnings", [])]
        parts += [f"LOOKS BROKEN  {line}" for line in warning_lines(found_broken)]
    if text := summary(report):
        parts.append(text)
    if paths:
        parts.append("\n".join(f"written  {path}" for path in paths))
    return "\n\n".join(parts)


def run_perplexity(args: argparse.Namespace) -> int:
    """The perplexity of one model."""
    from ..evaluate.perplexity import model_positions, perplexity, read_text
    from ..hub import record_perplexity
    from ..output_files import check_writable
    from .loading import load_model, load_tokenizer, quantization_method

    (name,), text = args.model, (args.text or ["wikitext-2-test"])[0]
    if args.record and (not Path(name).is_dir() or quantization_method(name) != "arb"):
        raise ValueError(f"--record needs the directory of a binarized model, and {name} is none.")
    if args.record:
        check_writable(Path(name) / "config.json")  # told before hours of measuring
    read_text(text)  # a missing text is told before the model is loaded
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype=args.dtype, device_map=args.device_map, backend=args.backend)
    result = perplexity(
        model,
        tokenizer,
        text=text,
        context_length=min(2048, model_positions(model) or 2048)
        if args.context_length is None
        else args.context_length,
        max_windows=args.max_windows,
        batch_size=args.batch_size,
        progress=not args.json,
    )
    if args.record:
        record_perplexity(name, result)
    config: Any = getattr(model.config, "quantization_config", None)
    bits = getattr(config, "bits_per_weight", None)
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    failed = args.max_perplexity is not None and not result.perplexity <= args.max_perplexity
    if args.json:
        print(json_text({"model": name, "bits_per_weight": bits, "bytes": parameters, **result.to_dict()}))
        return int(failed)
    pairs = [
        ("model", name),
        ("perplexity", f"{result.perplexity:,.2f}"),
        ("text", result.text),
        ("tokens predicted", f"{result.tokens:,} in {result.windows} windows of {result.context_length}"),
        ("negative log likelihood", f"{result.negative_log_likelihood:.4f} nats a token"),
        ("bytes of all parameters", size(parameters)),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    if bits is not None:
        calibration = getattr(config, "calibration", None)
        pairs.insert(1, ("binarized", f"{config.method}, {bits:.4f} true bits per weight"))
        pairs.insert(2, ("calibrated on", describe_calibration(calibration)))
    if args.max_perplexity is not None:
        pairs.append(("check", f"{'above' if failed else 'at most'} {args.max_perplexity:,.2f}"))
    print(fields(pairs))
    return int(failed)


def describe_calibration(calibration: dict | None) -> str:
    """One line about the calibration that a configuration records."""
    if not calibration:
        return "nothing (data-free)"
    return ", ".join(f"{name} {value}" for name, value in calibration.items() if value != [])
