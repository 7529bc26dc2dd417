"""`Saves`: a model is saved over another one, stopped on the way, and what is left is looked at."""

from __future__ import annotations

import hashlib
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
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_arb import ARBConfig, save_model
from optimum_arb.publish import JOURNAL, finish_interrupted

from .disks import mount, remove
from .process import address_space, fork, lower, on_events, run_child, stop_at, take_rights

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
        child = fork()
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
            return f"{more:,} bytes more", lambda: lower(resource.RLIMIT_AS, address_space() + more), None
        return "no rights", take_rights, None

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
        child = fork()
        if child == 0:
            run_child(lambda: on_events(lambda: counter.__setitem__(0, counter[0] + 1)), count)
        os.waitpid(child, 0)
        self.events[way] = int(os.read(reader, 32))
        os.close(reader)
        os.close(writer)
        remove(path)
