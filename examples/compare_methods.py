"""Methods side by side on one model: true bits, size, errors, perplexity; a table, and with matplotlib a plot.

    python examples/compare_methods.py MODEL --methods rtn,arb-rc,arb-hrc:1,arb-hrc:2 --num-samples 32

The same as `optimum-arb compare`, from Python. Run again with the same `--out`, it goes on after its last finished row.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from transformers.utils import logging

from optimum_arb.commands.compare import markdown
from optimum_arb.evaluate.compare import Settings, compare
from optimum_arb.evaluate.plot import plot_comparison


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods on a model.")
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a float model")
    parser.add_argument("--methods", default="rtn,arb-hrc:1,arb-hrc:2", help="rows, see `optimum-arb compare --help`")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-methods"), help="directory of the results")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration sequences (default: 16)")
    parser.add_argument("--sequence-length", type=int, default=512, help="their tokens (default: 512)")
    parser.add_argument("--context-length", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--max-windows", type=int, default=6, help="windows of WikiText-2's test split (default: 6)")
    args = parser.parse_args()
    logging.set_verbosity_error()

    settings = Settings(
        args.model,
        context_length=args.context_length,
        max_windows=args.max_windows,
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
    )
    rows = compare(settings, args.methods.split(","), args.out, progress=lambda line: print(line, flush=True))
    (args.out / "compare.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print("\n" + markdown(rows))
    if importlib.util.find_spec("matplotlib"):
        for path in plot_comparison(rows, args.out, f"{Path(args.model).name}, {settings.text}"):
            print(f"plot: {path}")
    failed = [name for name, row in rows.items() if "error" in row]
    if failed:
        raise SystemExit(f"could not be measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
