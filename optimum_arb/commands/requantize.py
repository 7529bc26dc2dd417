"""Repeat the run that made a binarized model, on another revision of its base, and show what changed.

Everything is taken from what the model records: the method, the calibration, the modules left in float, the base.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from .printing import fields, json_text, table

if TYPE_CHECKING:
    from ..requantize import Plan

EXAMPLES = """\
  %(prog)s me/my-model-arb my-model-arb-new
  %(prog)s my-model-arb my-model-arb-new --revision v1.1 --dataset my-texts.txt
  %(prog)s my-model-arb my-model-arb-new --base checkpoints/latest"""
# Modules that are shown, those whose error rose most first.
SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of the model that the earlier run made")
    parser.add_argument("out", metavar="OUT", help="directory to save the new one in")
    parser.add_argument("--base", metavar="NAME_OR_PATH", help="the float model (default: the recorded one)")
    parser.add_argument("--revision", metavar="R", help="of the base on the Hub (default: its newest)")
    parser.add_argument("--dataset", metavar="NAME_OR_PATH", help="the calibration text, where it was your own")
    parser.add_argument("--text", metavar="NAME_OR_PATH", help="the text of the recorded perplexity, likewise")
    parser.add_argument("--no-perplexity", action="store_true", help="do not measure it, where one is recorded")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's own, default), float32, bfloat16, ...")
    parser.add_argument("--device-map", default="cpu", metavar="MAP", help="cpu (default), cuda, auto, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that lies in OUT")


def run(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from ..checkpoint.quantize import saved_class
    from ..hub import record_perplexity
    from ..report import model_report
    from ..requantize import changes, plan_again
    from ..saving import check_not_source, check_output_directory, save_model
    from .loading import check_loading, check_model, load_processor, naming, quantization_method

    check_model(args.model)
    if args.base is not None:
        check_model(args.base)
    check_loading(args.dtype, args.device_map)
    check_output_directory(args.out, overwrite=args.overwrite)
    with naming(args.model):
        plan = plan_again(args.model, args.base, args.revision, args.dataset)
    check_model(plan.base)
    check_not_source(args.out, plan.base)
    if quantization_method(plan.base) is not None:
        raise ValueError(f"The base {plan.base} is quantized already: give the float model with --base.")
    text = None if args.no_perplexity else perplexity_text(plan, args.text)
    processor = load_processor(plan.base, plan.revision)
    start = time.perf_counter()
    revision = plan.revision or "main"
    model = saved_class(AutoConfig.from_pretrained(plan.base, revision=revision)).from_pretrained(
        plan.base,
        revision=revision,
        quantization_config=plan.config,
        dtype=args.dtype,
        device_map=args.device_map,
    )
    seconds = time.perf_counter() - start
    save_model(model, processor, args.out, overwrite=args.overwrite)
    measured = None
    if text is not None:
        from ..evaluate import perplexity

        recorded: Any = plan.earlier.config.perplexity
        measured = perplexity(
            model, processor, text, recorded["context_length"], recorded["windows"], progress=not args.json
        )
        record_perplexity(args.out, measured)
    quantizer: Any = model.hf_quantizer
    found = changes(
        plan,
        model_report(model),
        quantizer.quantization_config,
        quantizer.reproduce,
        None if measured is None else measured.to_dict(),
    )
    if args.json:
        print(json_text({"model": args.model, "out": args.out, "seconds": seconds, **found}))
    else:
        print(describe(args.model, args.out, plan, found, seconds))


def perplexity_text(plan: Plan, given: str | None) -> str | None:
    """The text of the perplexity that the earlier model records; None where it records none.

    Raises:
        ValueError: it is a file of the user's, or the text was given and there is nothing to compare with.
        FileNotFoundError: no such file.
    """
    from ..data import BUNDLED_TEXTS
    from ..evaluate.perplexity import read_text

    recorded = plan.earlier.config.perplexity
    if recorded is None:
        if given is not None:
            raise ValueError("--text is for the recorded perplexity, and the earlier model records none.")
        return None
    if given is None and recorded["text"] not in BUNDLED_TEXTS:
        raise ValueError(
            f"The perplexity of the earlier model was measured on {recorded['text']!r}, which is not recorded: give "
            "the text with --text, or leave the perplexity out with --no-perplexity."
        )
    read_text(given or recorded["text"])
    return given or recorded["text"]


def describe(model: str, out: str, plan: Plan, found: dict[str, Any], seconds: float) -> str:
    """The readable form."""
    rows = []
    for key, name in (
        ("base_revision", "revision of the base"),
        ("base_fingerprint", "fingerprint of the base"),
        ("optimum_arb", "optimum_arb"),
        ("calibration", "fingerprint of the calibration"),
    ):
        rows.append([name, *(_short(found[key][when]) for when in ("before", "after")), _same(found[key])])
    for key, name in (
        ("bits_per_weight", "true bits per weight"),
        ("packed_bytes", "bytes binarized"),
        ("weight_error", "mean weight error"),
        ("output_error", "mean output error"),
        ("held_out_error", "mean held-out error"),
        ("perplexity", "perplexity"),
    ):
        pair = found[key]
        rows.append([name, *(_number(pair[when]) for when in ("before", "after")), _change(pair)])
    text = table(["", "before", "after", "change"], rows)
    moved = [
        [
            name,
            *(_number(errors["output_error"][when]) for when in ("before", "after")),
            _change(errors["output_error"]),
        ]
        for name, errors in found["modules"].items()
        if None not in errors["output_error"].values()
    ]
    if moved:
        text += "\n\n" + table(
            [f"output error, {min(SHOWN, len(moved))} largest rises", "before", "after", "change"], moved[:SHOWN]
        )
    elif plan.earlier.report is None:
        text += "\n\nThe earlier model has no arb_report.json: the errors of its layers are not known."
    pairs = [("saved", f"{plan.base} -> {out}, as {model} was made"), ("seconds", f"{seconds:.1f}")]
    before = set(found["broken"]["before"] or [])
    for name in found["broken"]["after"]:
        pairs.append(("LOOKS BROKEN", name + (" (so it did before)" if name in before else "")))
    return text + "\n\n" + fields(pairs)


def _short(value: Any) -> str:
    return "unknown" if value is None else str(value).removeprefix("sha256:")[:12]


def _same(pair: dict[str, Any]) -> str:
    if None in pair.values():
        return "-"
    return "the same" if pair["before"] == pair["after"] else "another"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _change(pair: dict[str, Any]) -> str:
    before, after = pair["before"], pair["after"]
    if before is None or after is None:
        return "-"
    if before == after:
        return "none"
    return f"{(after - before) / before:+.1%}" if before else "from 0"
