"""Links, pipes, and files that would like to be executed."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

from .files import edited_json


def links(folder: Path, others: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    other = rng.choice(sorted(others.iterdir()))
    target = rng.choice(
        ("/dev/zero", "/dev/null", "/etc/passwd", str(path), str(folder), str(other / path.name), "missing")
    )
    path.unlink()
    path.symlink_to(target)
    return f"{path.name} -> {target.replace(str(others.parent), '')}"


def other_kinds_of_files(folder: Path, others: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    kind = rng.choice(("missing", "directory", "pipe", "empty", "unreadable text"))
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"\xff\xfe\x00" * 100)
    return f"{path.name}: {kind}"


class _Evil:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def pickled(folder: Path, others: Path, rng: random.Random) -> str:
    """A pickle that runs code, in the place of the weights or beside them."""
    evil = pickle.dumps(_Evil(str(folder / "executed")))
    name = rng.choice(("pytorch_model.bin", "model.safetensors", "model.bin", "model.pt", "training_args.bin"))
    if rng.random() < 0.6:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    (folder / name).write_bytes(evil)
    return name


def remote_code(folder: Path, others: Path, rng: random.Random) -> str:
    """A configuration that asks for code beside it."""
    code = f"import os\nos.mkdir({str(folder / 'executed')!r})\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_evil.py", "__init__.py", "conftest.py", "setup.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    with edited_json(folder / "config.json") as content:
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        if rng.random() < 0.5:
            content["model_type"] = "evil"
        if rng.random() < 0.3:
            content["quantization_config"]["auto_map"] = {"AutoConfig": "evil.Evil"}
        return f"auto_map, model_type {content['model_type']}"
