"""Saving is killed at random instants, and every directory that is left is looked at.

    python benchmarks/kill_saves.py                    # 200 instants, about two minutes
    python benchmarks/kill_saves.py --trials 1000 --seed 1

A process saves a tiny binarized model where another one lies (or none), and is stopped: by SIGKILL, SIGTERM or Ctrl-C
at a random moment or right before a random operation on files, by a full disk (a tmpfs where it may be mounted, else a
limit on the size of files), by a limit on its memory, or by a directory that it may not write to. What is left must be
nothing, the old model, the new model, the new one complete in the journal, or, of `save_pretrained` where there was no
model, which writes its files there one after the other, files that do not load. Then the next save must succeed and
leave nothing else behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from killing.disks import can_mount
from killing.saves import SIGNALS, STOPS, WAYS, Saves, Trial


def run(trials: int, seed: int, folder: Path) -> Iterator[Trial]:
    """Stops saves, each way and each stop in turn, at instants that the seed decides as far as the clock lets it."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        mounts = can_mount(folder)
    saves = Saves(folder, mounts)
    ways = [way for way in WAYS if mounts or way != "over a mount point"]
    for index, way in enumerate(ways):
        saves.measure(way, -1 - index)
    rng = random.Random(seed)
    # two of three are signals; a disk of its own cannot be full under a mount point, or where rights are missing
    plan = [(way, stop) for way in ways for stop in (*SIGNALS, *SIGNALS, *STOPS[3:])]
    plan = [(way, stop) for way, stop in plan if way != "over a mount point" or stop != "full disk"]
    for number in range(trials):
        if number % len(plan) == 0:
            rng.shuffle(plan)
        yield saves.trial(number, *plan[number % len(plan)], rng)


def table(trials: list[Trial]) -> str:
    """What was left, by the way of saving and by what stopped it."""
    kinds = ("old", "new", "journal", "nothing", "refused")
    lines = [f"| saved | stopped by | saves | {' | '.join(kinds)} | other |", "|---|---|" + "---|" * (len(kinds) + 2)]
    for way in dict.fromkeys(trial.way for trial in trials):
        for stop in STOPS:
            left = Counter(t.left for t in trials if (t.way, t.stop) == (way, stop))
            if left:
                counts = [left.pop(kind, 0) for kind in kinds]
                total = sum(counts) + sum(left.values())
                cells = " | ".join(map(str, [total, *counts, sum(left.values())]))
                lines.append(f"| {way} | {stop} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own must not be forked
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    done = []
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # a process that may not write there is to see what is there
        for trial in run(args.trials, args.seed, Path(folder)):
            done.append(trial)
            if not trial.good:
                print(trial, flush=True)
    bad = [trial for trial in done if not trial.good]
    print(table(sorted(done, key=lambda trial: WAYS.index(trial.way))))
    print(f"\n{len(done)} saves were stopped; {len(done) - len(bad)} left what they may leave, {len(bad)} did not.")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
