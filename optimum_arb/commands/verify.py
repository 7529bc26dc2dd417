"""Hold a model against thresholds from a TOML file; exit with 1 where one is missed. Made for CI."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .printing import fields, json_text, table

if TYPE_CHECKING:
    from ..evaluate.thresholds import Check

EXAMPLES = """\
  %(prog)s my-model-arb --baseline my-model --thresholds verify.toml
  %(prog)s my-model-arb --thresholds verify.toml --json --report report.html

verify.toml:
  max_perplexity_ratio = 1.5
  min_top1_agreement = 0.8
  max_bits_per_weight = 2.4
  min_tokens_per_second_ratio = 1.0

  [measure]
  max_windows = 20
  batch_sizes = [1]

Only what the thresholds need is measured. docs/verify.md lists them all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of the model to check")
    parser.add_argument("--baseline", metavar="BASE", help="the model that it was made from, for ratios and agreement")
    parser.add_argument("--thresholds", metavar="FILE", required=True, help="a TOML file of bounds")
    parser.add_argument("--report", action="append", default=[], metavar="PATH", help="as of evaluate")
    parser.add_argument("--device-map", metavar="MAP", help="in place of the file's: cpu, cuda, auto, ...")
    parser.add_argument("--dtype", help="in place of the file's: auto, float32, bfloat16, ...")
    parser.add_argument("--backend", metavar="NAME", help="in place of the file's: how a binarized model computes")


def run(args: argparse.Namespace) -> int:
    from ..evaluate.evaluation import evaluate
    from ..evaluate.report_files import report_paths, write_reports
    from ..evaluate.thresholds import THRESHOLDS, check, read_thresholds

    thresholds = read_thresholds(args.thresholds)
    if thresholds.needs_baseline and args.baseline is None:
        name = next(name for name in thresholds.limits if name in THRESHOLDS and THRESHOLDS[name].baseline)
        raise ValueError(f"{name} is a comparison with the baseline: give --baseline.")
    paths = report_paths(args.report)
    given = {key: getattr(args, key) for key in ("device_map", "dtype", "backend") if getattr(args, key) is not None}
    report = evaluate(
        [args.model],
        args.baseline if thresholds.needs_baseline else None,
        replace(thresholds.settings, **given),
        progress=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
        bars=not args.json,
    )
    write_reports(report, paths)
    checks = check(thresholds, report)
    failed = [found for found in checks if not found.passed]
    if args.json:
        result = {"model": args.model, "baseline": args.baseline, "passed": not failed}
        print(json_text({**result, "checks": [asdict(found) for found in checks], "report": report}))
    else:
        print(describe(checks))
    return int(bool(failed))


def describe(checks: list[Check]) -> str:
    """The readable form."""
    rows = [
        [
            "ok" if found.passed else "FAILED",
            found.name,
            f"{found.limit:,.6g}",
            "-" if found.measured is None else f"{found.measured:,.6g}",
            _by_how_much(found),
            found.what,
        ]
        for found in checks
    ]
    failed = sum(not found.passed for found in checks)
    verdict = f"{failed} of {len(checks)} failed" if failed else f"all {len(checks)} kept"
    return (
        table(["", "threshold", "limit", "measured", "margin", "what"], rows) + "\n\n" + fields([("checks", verdict)])
    )


def _by_how_much(found: Check) -> str:
    if found.excess is None:
        return "-"
    return f"{abs(found.excess):.1%} {'within' if found.passed else 'beyond'}"
