"""`Runs`: a model is binarized from disk to disk, stopped on the way, looked at and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from random_llama import random_llama
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.checkpoint.run import work_directory
from optimum_arb.checkpoint.work import MANIFEST
from optimum_arb.publish import JOURNAL

from .disks import mount, remove
from .process import (
    address_space,
    fork,
    give_away,
    lower,
    on_events,
    run_child,
    set_writable,
    stop_at,
    take_rights,
)

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
STOPS = (*SIGNALS, "full disk", "out of memory", "not writable")
ROOM = 1 << 28  # bytes of a disk that is not full


@dataclass(frozen=True)
class Trial:
    """One run that was stopped and resumed.

    Attributes:
        stop: one of `STOPS`.
        instant: when, in words.
        activations_on_disk: where its hidden states were.
        overwrite: whether a model lay in its place before.
        ended: "signal" and its number, "finished", or the error that it ended with.
        left: "nothing", "old", "new" or "journal" in the output directory; anything else is a failure.
        finished_layers: that were kept beside it.
        resumed: whether the run that went on ended well.
        identical: whether every file is then that of a run that nobody stopped, and the model loads.
        leftovers: what else lies beside the output directory at the end.
    """

    stop: str
    instant: str
    activations_on_disk: bool
    overwrite: bool
    ended: str
    left: str
    finished_layers: int
    resumed: bool
    identical: bool
    leftovers: list[str]

    @property
    def good(self) -> bool:
        there = ("old", "new", "journal") if self.overwrite else ("nothing", "new")
        name, _, message = self.ended.partition(": ")
        said = name.startswith(("finished", "signal ", "KeyboardInterrupt", "MemoryError")) or bool(message)
        return self.left in there and said and self.resumed and self.identical and not self.leftovers


def make_model(path: Path, layers: int, seed: int) -> None:
    """A Llama of random weights that are large enough for something to come out of it."""
    sizes = {"vocab_size": 96, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": layers}
    model = random_llama(seed, **sizes, tie_word_embeddings=True)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.6 / parameter.shape[1] ** 0.5)
    model.save_pretrained(path)


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def size(path: Path) -> int:
    """Bytes of the files in a directory, on a tmpfs, which has pages of 4 KiB."""
    return sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in path.rglob("*"))


class Runs:
    """A float model, what an undisturbed run makes of it, and runs that are stopped."""

    def __init__(self, folder: Path, layers: int, seed: int, mounts: bool):
        self.folder = folder
        self.layers = layers
        self.mounts = mounts
        tokens = torch.randint(5, 96, (8, 32), generator=torch.Generator().manual_seed(seed))
        self.config = ARBConfig(dataset=tokens, block_size=64)
        make_model(folder / "float", layers, seed)
        make_model(folder / "other", 1, seed + 1)
        counted = [0]
        whole = folder / "reference" / "model"
        ended, _, told = self._child(
            self.work(whole),
            lambda: on_events(lambda: counted.__setitem__(0, counted[0] + 1)),
            report=lambda: [counted[0], address_space("VmPeak")],
        )
        assert ended == "finished", ended
        self.operations = told[0]
        self.bytes = told[1] - address_space("VmSize")  # that it maps beyond those of this process
        self.expected = digests(whole)
        self.seconds = self._child(self.work(folder / "again" / "model"))[1]  # the first one also waits for the disk
        ended, _, _ = self._child(self.work(folder / "old" / "model", "other"))
        assert ended == "finished", ended
        self.old = digests(folder / "old" / "model")
        os.chmod(folder, 0o755)
        for path in (folder / "float", *(folder / "float").iterdir()):  # a process without rights is to read it
            os.chmod(path, 0o755)

    def work(self, output: Path, source: str = "float", **options: bool) -> Callable[[], None]:
        return lambda: quantize_checkpoint(self.folder / source, output, self.config, **options) and None

    def _child(
        self,
        work: Callable[[], None],
        before: Callable[[], None] = lambda: None,
        meanwhile: Callable[[int], None] = lambda child: None,
        report: Callable[[], list[int]] = list,
    ) -> tuple[str, float, list[int]]:
        """Runs something in a copy of this process.

        Args:
            work: what.
            before: what the process does first.
            meanwhile: what this process does to it, given its number.
            report: what it tells of itself when it is done.

        Returns:
            What `Trial.ended` says; its seconds; and the report.
        """
        reader, writer = os.pipe()

        def told() -> None:
            try:
                work()
                os.write(writer, json.dumps(["", report()]).encode())
            except BaseException as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"
                os.write(writer, json.dumps([text, []]).encode())
                raise

        began = time.perf_counter()
        child = fork()
        if child == 0:
            run_child(before, told)
        os.close(writer)
        meanwhile(child)
        deadline = time.monotonic() + 120
        status = 0
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "a hang: more than 120 s", 120.0, []
            time.sleep(0.002)
        status = found[1]
        seconds = time.perf_counter() - began
        with open(reader, "rb") as pipe:
            text = pipe.read()
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}", seconds, []
        if not text:
            return "ended without a word: ", seconds, []
        error, numbers = json.loads(text)
        return error or "finished", seconds, numbers

    def trial(self, number: int, stop: str, rng: random.Random) -> Trial:
        """Stops a run, looks at what it left, and resumes it."""
        on_disk, overwrite = bool(rng.getrandbits(1)), bool(rng.getrandbits(1))
        output = self.folder / f"trial-{number}" / "model"
        output.parent.mkdir()
        if stop == "full disk" and self.mounts:
            need = 2.5 * size(self.folder / "reference") + 1e5 * on_disk
            room = round(rng.uniform(0.05, 1.1) * need) + overwrite * size(self.folder / "old") + (1 << 14)
            mount(output.parent, room)
        else:
            room = 0
        if overwrite:
            shutil.copytree(self.folder / "old" / "model", output)
        instant, before, meanwhile = self._instant(stop, rng, output.parent, room)
        options = {"activations_on_disk": on_disk, "overwrite": overwrite}
        ended, _, _ = self._child(self.work(output, **options), before, meanwhile)
        if stop == "not writable":
            set_writable(output.parent, True)
        left = self.state(output)
        manifest = work_directory(output) / MANIFEST
        layers = len(json.loads(manifest.read_text())["pieces"]) if manifest.is_file() else 0
        if room:
            subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(output.parent)], check=True)
        again, _, _ = self._child(self.work(output, resume=True, **options))
        found = digests(output)
        loads = self._child(lambda: AutoModelForCausalLM.from_pretrained(output) and None)[0] == "finished"
        leftovers = sorted(path.name for path in output.parent.iterdir() if path != output)
        remove(output)
        identical = found == self.expected and loads
        return Trial(stop, instant, on_disk, overwrite, ended, left, layers, again == "finished", identical, leftovers)

    def state(self, output: Path) -> str:
        """What lies in the output directory."""
        if not output.exists():
            return "nothing"
        found = digests(output)
        if found in (self.old, self.expected):
            return "new" if found == self.expected else "old"
        if (output / JOURNAL).exists() and "config.json" not in found:
            return "journal"
        return f"something else: {sorted(found)}"

    def _instant(
        self, stop: str, rng: random.Random, place: Path, room: int
    ) -> tuple[str, Callable[[], None], Callable[[int], None]]:
        """When a run ends, in words; what its process does first; what is done to it meanwhile."""
        seconds = rng.uniform(0, self.seconds)
        if stop in SIGNALS and rng.random() < 0.5:

            def end(child: int) -> None:
                time.sleep(seconds)
                os.kill(child, getattr(signal, stop))

            return f"after {seconds:.3f} s", lambda: None, end
        if stop in SIGNALS:
            operation = rng.randrange(self.operations)
            text = f"before operation {operation} of {self.operations}"
            return text, lambda: stop_at(operation, getattr(signal, stop)), lambda child: None
        if stop == "full disk" and room:
            return f"at {room:,} bytes", lambda: None, lambda child: None
        if stop == "full disk":
            limit = rng.randrange(1, max(file.stat().st_size for file in (self.folder / "reference").rglob("*")))
            return f"files of {limit:,} bytes", lambda: lower(resource.RLIMIT_FSIZE, limit), lambda child: None
        if stop == "out of memory":
            more = rng.randrange(1 << 12, self.bytes)
            limit = address_space("VmSize") + more
            return f"{more:,} bytes more", lambda: lower(resource.RLIMIT_AS, limit), lambda child: None
        give_away(place)

        def forbid(child: int) -> None:
            time.sleep(seconds)
            set_writable(place, False)

        return f"after {seconds:.3f} s", take_rights, forbid
