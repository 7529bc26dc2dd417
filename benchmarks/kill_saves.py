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
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from random_llama import random_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_arb import ARBConfig, save_model
from optimum_arb.publish import JOURNAL, finish_interrupted

# how the model is saved -> what lies in its place before
WAYS = (
    "new place",
    "over a model",
    "over a model with other files",
    "over a mount point",
    "save_pretrained over a model",
    "save_pretrained in a new place",
)
STOPS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "out of memory", "not writable")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
# What is counted as an operation on files: Python's audit events of these names.
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.dlsym", "mmap.")
_NOBODY = 65534


@dataclass(frozen=True)
class Trial:
    """One save that was stopped.

    Attributes:
        way: one of `WAYS`.
        stop: one of `STOPS`.
        instant: when, in words.
        left: what was left: "nothing", "old", "new", "journal", "refused"; anything else is a failure.
        after: "whole" where the next save succeeded; anything else is a failure.
    """

    way: str
    stop: str
    instant: str
    left: str
    after: str

    @property
    def good(self) -> bool:
        refused = ("refused",) if self.way == "save_pretrained in a new place" else ()
        return self.left in ("nothing", "old", "new", "journal", *refused) and self.after == "whole"


def tiny(folder: Path, seed: int) -> PreTrainedModel:
    """A binarized Llama of about a million weights."""
    random_llama(seed, vocab_size=512, hidden_size=256, intermediate_size=512).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=ARBConfig(dataset=None, seed=seed))


def digest(model: PreTrainedModel) -> str:
    """Of all tensors of a model."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Saves:
    """Two models, and the ways in which one is saved over the other."""

    def __init__(self, folder: Path, mounts: bool):
        self.folder = folder
        self.mounts = mounts
        # of the same shapes: a mix of the two could be loaded
        self.models = {"old": tiny(folder / "a", 0), "new": tiny(folder / "b", 1)}
        self.digests = {digest(model): name for name, model in self.models.items()}
        save_model(self.models["old"], None, folder / "saved")
        self.bytes = sum(file.stat().st_size for file in (folder / "saved").iterdir())
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def prepare(self, way: str, number: int, size: int | None = None) -> Path:
        """The place of one trial, alone in its directory. `size`: bytes of the disk that is mounted there."""
        parent = self.folder / f"trial-{number}"
        parent.mkdir()
        if size is not None:
            mount(parent, size)
        path = parent / "model"
        if way == "over a mount point":
            path.mkdir()
            mount(path, 1 << 28)
        if "new place" not in way:
            shutil.copytree(self.folder / "saved", path, dirs_exist_ok=True)
        if way == "over a model with other files":
            (path / "notes.md").write_text("mine")
            (path / "own").mkdir()
            (path / "own" / "data").write_text("mine")
        return path

    def save(self, way: str, path: Path) -> None:
        if way.startswith("save_pretrained"):
            self.models["new"].save_pretrained(path, max_shard_size="200KB")
        else:
            save_model(self.models["new"], None, path, overwrite=True)

    def state(self, path: Path) -> str:
        """What lies in a place."""
        if (path / JOURNAL).exists() and not (path / "config.json").exists():
            complete = path.with_name("completed")  # of a copy, so that the next save meets the journal
            shutil.copytree(path, complete)
            finish_interrupted(complete)
            found = self.state(complete)
            shutil.rmtree(complete)
            return "journal" if found == "new" else f"a journal of {found}"
        if not path.exists() or not any(path.glob("*.safetensors")):
            return "nothing"
        try:
            model = AutoModelForCausalLM.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            return "refused" if str(error) else f"an empty {type(error).__name__}"
        found = self.digests.get(digest(model), "a mix")
        same = found in self.models and model.config.quantization_config.seed == list(self.models).index(found)
        return found if same else "a mix"

    def check_after(self, way: str, path: Path) -> str:
        """Saves again, undisturbed, and says whether that left the new model and nothing else."""
        save_model(self.models["new"], None, path, overwrite=True)
        found = self.state(path)
        others = {entry.name for entry in path.parent.iterdir()} - {path.name}
        hidden = {entry.name for entry in path.iterdir() if entry.name.startswith(".")}
        if found != "new" or others or hidden:
            return f"{found}, and {sorted(others | hidden)}"
        if way == "over a model with other files":
            kept = [(path / name).read_text() for name in ("notes.md", "own/data")]
            if kept != ["mine", "mine"]:
                return f"other files became {kept}"
        return "whole"

    def trial(self, number: int, way: str, stop: str, rng: random.Random) -> Trial:
        size = None
        if stop == "full disk" and self.mounts:
            need = self.bytes * (1 if "new place" in way else 2) + (1 << 15)
            size = max(4096 if "new place" in way else self.bytes, round(need * rng.uniform(0.4, 1.1))) + (1 << 15)
        path = self.prepare(way, number, size)
        instant, before, wait = self._instant(way, stop, rng, size)
        if stop == "not writable":
            os.chmod(path if path.exists() else path.parent, 0o555)
        child = os.fork()
        if child == 0:
            run_child(before, lambda: self.save(way, path))
        if wait is not None:
            time.sleep(wait)
            os.kill(child, getattr(signal, stop))
        deadline = time.monotonic() + 60
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Trial(way, stop, instant, "a hang", "")
            time.sleep(0.002)
        if stop == "not writable":
            os.chmod(path if path.exists() else path.parent, 0o755)
        left = self.state(path)
        if size is not None:
            subprocess.run(["mount", "-o", f"remount,size={1 << 28}", str(path.parent)], check=True)
        after = self.check_after(way, path)
        remove(path)
        return Trial(way, stop, instant, left, after)

    def _instant(
        self, way: str, stop: str, rng: random.Random, size: int | None
    ) -> tuple[str, Callable[[], None], float | None]:
        """When a trial ends, in words; what its process does first; the seconds after which it gets a signal."""
        if stop in SIGNALS and rng.random() < 0.5:
            seconds = rng.uniform(0, 1.1 * self.seconds[way])
            return f"after {seconds:.4f} s", lambda: None, seconds
        if stop in SIGNALS:
            events = self.events[way]
            # every other one in the last fifth, where a model takes its place
            event = rng.randrange(events) if rng.random() < 0.5 else rng.randrange(events * 4 // 5, events)
            return f"before operation {event} of {events}", lambda: stop_at(event, getattr(signal, stop)), None
        if stop == "full disk" and size is not None:
            return f"at {size:,} bytes", lambda: None, None
        if stop == "full disk":
            limit = rng.randrange(1, self.bytes)
            return f"files of {limit:,} bytes", lambda: lower(resource.RLIMIT_FSIZE, limit), None
        if stop == "out of memory":
            more = rng.randrange(1 << 12, 1 << 21)
            return f"{more:,} bytes more", lambda: lower(resource.RLIMIT_AS, virtual_bytes() + more), None
        return "no rights", drop_rights, None

    def measure(self, way: str, number: int) -> None:
        """How long a save takes, and how many operations on files."""
        path = self.prepare(way, number)
        began = time.perf_counter()
        self.save(way, path)
        self.seconds[way] = time.perf_counter() - began
        remove(path)
        path = self.prepare(way, number)
        reader, writer = os.pipe()

        def count() -> None:
            self.save(way, path)
            os.write(writer, str(counter[0]).encode())

        counter = [0]
        child = os.fork()
        if child == 0:
            run_child(lambda: on_events(lambda: counter.__setitem__(0, counter[0] + 1)), count)
        os.waitpid(child, 0)
        self.events[way] = int(os.read(reader, 32))
        os.close(reader)
        os.close(writer)
        remove(path)


def run_child(before: Callable[[], None], work: Callable[[], None]) -> None:
    """What a forked process does; it never returns."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        before()
        work()
    except BaseException:
        if os.environ.get("KILL_SAVES_VERBOSE"):
            with open("/dev/tty" if os.path.exists("/dev/tty") else os.devnull, "w") as terminal:
                traceback.print_exc(file=terminal)
        os._exit(1)
    os._exit(0)


def on_events(act: Callable[[], None]) -> None:
    """Calls `act` before every operation on files of this process, from now on."""
    active = [False]

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(_EVENTS) and not active[0]:
            active[0] = True
            try:
                act()
            finally:
                active[0] = False

    sys.addaudithook(hook)


def stop_at(event: int, number: signal.Signals) -> None:
    """Sends this process a signal right before one of its operations on files."""
    left = [event]

    def act() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), number)
        left[0] -= 1

    on_events(act)


def lower(limit: int, value: int) -> None:
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def virtual_bytes() -> int:
    """The address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def drop_rights() -> None:
    """This process may do no more than any user."""
    if os.getuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def mount(path: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", str(path)], check=True)  # a model that was loaded from there may still be mapped


def remove(path: Path) -> None:
    """Everything of a trial."""
    for place in (path, path.parent):
        if os.path.ismount(place):
            unmount(place)
    shutil.rmtree(path.parent)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    try:
        mount(folder, 1 << 16)
    except (OSError, subprocess.CalledProcessError):
        return False
    unmount(folder)
    return True


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
