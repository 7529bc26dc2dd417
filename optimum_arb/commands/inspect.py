"""Show what a binarized model holds: true bits, bytes, errors, what stayed in float. No weights are loaded."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..layer_warnings import kind_of, warning_lines
from .printing import fields, json_text, ratio, size, table
from .quantize import ERRORS, mean

if TYPE_CHECKING:
    from ..inspection import Inspection, StoredModule


EXAMPLES = """\
  %(prog)s smollm2-arb
  %(prog)s smollm2-arb --modules
  %(prog)s smollm2-arb --plot errors.svg"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a binarized model")
    parser.add_argument("--modules", action="store_true", help="one line for each module instead of each kind")
    parser.add_argument("--plot", metavar="FILE", help="draw the error of each layer into this .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    from ..inspection import inspect_model
    from .loading import check_model, naming

    check_model(args.model)
    if args.plot is not None:
        from ..evaluate.plot import check_plot_path

        check_plot_path(args.plot)
    with naming(args.model):
        result = inspect_model(args.model)
    if args.plot is not None:
        from ..evaluate.plot import plot_layers

        if result.report is None:
            raise ValueError(f"--plot needs arb_report.json beside the model, and {args.model} has none that fits it.")
        plot_layers(result.report, args.plot, Path(args.model).name)
    print(json_text(result.to_dict()) if args.json else describe(args.model, result, args.modules))


def describe(model: str, result: Inspection, every_module: bool = False) -> str:
    """The readable form."""
    from .evaluate import describe_calibration

    config = result.config
    packed = sum(module.stored_bytes for module in result.modules)
    text = fields(
        [
            ("model", model),
            ("method", f"{config.method}, format version {config.format_version}"),
            ("written by", f"optimum_arb {config.optimum_arb_version or 'unknown'}"),
            ("calibrated on", describe_calibration(config.calibration)),
            ("true bits per weight", f"{result.bits_per_weight:.4f} over {result.weights:,} binarized weights"),
            ("bytes binarized", f"{packed:,} ({size(packed)})"),
            ("bytes in float", f"{result.stored_bytes - packed:,} ({size(result.stored_bytes - packed)})"),
            ("bytes of all tensors", f"{result.stored_bytes:,} ({size(result.stored_bytes)})"),
            ("bytes of the files", f"{result.file_bytes:,} ({size(result.file_bytes)})"),
        ]
    )
    headers = ["binarized", "modules", "layout", "weights", "bytes", "bits"]
    groups = {m.name: [m] for m in result.modules} if every_module else by_kind(result.modules)
    rows = [_row(name, modules) for name, modules in groups.items()]
    if result.report is not None:
        reports = {module.name: module for module in result.report}
        known = [key for key in ERRORS if any(getattr(module, key) is not None for module in result.report)]
        headers += [ERRORS[key] for key in known]
        for row, modules in zip(rows, groups.values(), strict=True):
            row += [ratio(mean([getattr(reports[m.name], key) for m in modules])) for key in known]
        if any(module.hadamard_gain is not None for module in result.report):
            headers.append("Hadamard gain")
            for row, modules in zip(rows, groups.values(), strict=True):
                row.append(ratio(mean([reports[m.name].hadamard_gain for m in modules])))
    text += "\n\n" + table(headers, rows)
    for line in warning_lines(result.warnings):
        text += f"\nLOOKS BROKEN  {line}"
    return text + "\n\n" + table(["stayed in float", "bytes", "why"], _float_rows(result))


def by_kind(modules: Iterable[StoredModule]) -> dict[str, list[StoredModule]]:
    """Modules of the same role, layer numbers apart: "model.layers.*.mlp.up_proj"."""
    kinds: dict[str, list[StoredModule]] = defaultdict(list)
    for module in modules:
        kinds[kind_of(module.name)].append(module)
    return dict(kinds)


def _row(name: str, modules: list[StoredModule]) -> list[str]:
    weights = sum(math.prod(module.shape) for module in modules)
    count = sum(module.stored_bytes for module in modules)
    layouts = ", ".join(sorted({module.layout for module in modules}))
    return [name, str(len(modules)), layouts, f"{weights:,}", f"{count:,}", f"{8 * count / weights:.4f}"]


def _float_rows(result: Inspection) -> list[list[str]]:
    """Linears that stayed in float with their reason, then everything else that was never a linear's weight."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    binarized = {module.name for module in result.modules}
    for name, count in result.float_tensors.items():
        module = name.rpartition(".")[0]
        is_bias = module in binarized or name.removesuffix("_bias") in binarized
        no_weight = "bias of a binarized linear" if is_bias else "no linear layer"
        reason = result.kept.get(module) or result.kept.get(name) or no_weight
        sums[kind_of(name), reason] += count
    for name, reason in result.kept.items():
        if not any(tensor == name or tensor.startswith(f"{name}.") for tensor in result.float_tensors):
            sums[kind_of(name), f"{reason} (stored with the tensor it is tied to)"] += 0
    return [[kind, f"{count:,}", reason] for (kind, reason), count in sorted(sums.items(), key=lambda item: -item[1])]
