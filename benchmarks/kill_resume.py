"""Runs of `quantize_checkpoint` stopped at random instants, and what resuming them gives.

    python benchmarks/kill_resume.py                 # 200 instants, some minutes; a table
    python benchmarks/kill_resume.py --kills 12 --json

Each trial binarizes a small random Llama in a process of its own, stops that, looks at what it left, runs it again with
`resume=True`, and compares every file with those of a run that nobody stopped. What stops it: SIGKILL, SIGTERM or
Ctrl-C at a random moment or right before a random operation on files, a full disk (a tmpfs where it may be mounted,
else a limit on the size of files), a limit on its memory, or directories that it may not write to any more from a
random moment on. At random it keeps the hidden states on disk, and replaces a model that is already there. Exits with 1
if any file differs, anything looked finished that was not, or a run that was not killed ended without saying why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from killing.disks import can_mount
from killing.runs import STOPS, Runs, Trial


def table(trials: list[Trial]) -> str:
    """What was left, by what stopped the runs."""
    lines = [
        "| stopped by | runs | ended with an error | finished before | nothing there | the old model | the new model "
        "| layers kept, mean | resumed: every file the same |",
        "|---" * 9 + "|",
    ]
    for stop in (*STOPS, None):
        some = [trial for trial in trials if stop in (None, trial.stop)]
        if not some:
            continue
        errors = sum(trial.ended != "finished" and not trial.ended.startswith("signal ") for trial in some)
        finished = sum(trial.ended == "finished" for trial in some)
        left = [sum(trial.left == kind for trial in some) for kind in ("nothing", "old", "new")]
        kept = sum(trial.finished_layers for trial in some) / len(some)
        same = sum(trial.resumed and trial.identical and not trial.leftovers for trial in some)
        cells = [len(some), errors, finished, *left, f"{kept:.1f}", same]
        lines.append(f"| {stop or '**all**'} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own must not be forked
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rng = random.Random(args.seed)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as name:
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            mounts = can_mount(Path(name))
        runs = Runs(Path(name), args.layers, args.seed, mounts)
        plan: list[str] = []
        for number in range(args.kills):
            if not plan:
                plan = list(STOPS)
                rng.shuffle(plan)
            trials.append(runs.trial(number, plan.pop(), rng))
            if not trials[-1].good:
                print(trials[-1], file=sys.stderr, flush=True)
    bad = [trial for trial in trials if not trial.good]
    if args.json:
        print(json.dumps({"seconds": runs.seconds, "trials": [asdict(trial) for trial in trials]}))
    else:
        disks = "a tmpfs" if mounts else "a limit on the size of files"
        print(
            f"{args.layers} layers, {len(runs.expected)} files; {runs.seconds:.2f} s and {runs.operations} operations"
        )
        print(f"on files where nobody stops it. A full disk is {disks}.\n")
        print(table(trials))
        print(f"\n{len(trials)} runs were stopped; {len(trials) - len(bad)} gave the same bits when resumed.")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
