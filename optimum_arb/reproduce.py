"""What it takes to repeat a measurement or a run: versions, machine, threads, seed, fingerprints, the command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .version import __version__

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "optimum", "numpy", "triton")
# Variables that change what is computed or how fast; those of the Hub's client may hold a token and stay out.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "TRITON_INTERPRET",
)
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_CHUNK = 1 << 24
_HASHED_AT_ONCE = 8
# An absolute path, which may hold spaces: a word, the value of an option, or one of a list with commas.
_PATH = re.compile(r"(^|[=,])/(?:[^/,]*/)*([^/,]+)/*(?=,|$)")
_TOKEN = re.compile(r"hf_[A-Za-z0-9_]{3,}")
_SECRET = re.compile(r"--?\S*(token|secret|password|passwd|api.?key)", re.IGNORECASE)


def reproduce_block(
    models: dict[str, dict[str, Any]] | None = None,
    datasets: dict[str, str] | None = None,
    seed: int | None = None,
    whole_paths: bool = True,
) -> dict[str, Any]:
    """What a report says of how it came about.

    Args:
        models: role -> what `model_facts` knows of the model.
        datasets: name of a text -> its fingerprint, see `text_fingerprint`.
        seed: of random choices.
        whole_paths: False cuts absolute paths in the command to their last name: for what is uploaded with a model.

    Returns:
        Plain JSON values: `command`, `versions`, `python`, `platform`, `cpu`, `cpu_count`, `threads`, `gpus`, `cuda`,
        `environment`, `deterministic_algorithms`, and `models`, `datasets` and `seed` as given.
    """
    block: dict[str, Any] = {
        "command": command_line(whole_paths),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpu_names(),
        "cuda": torch.version.cuda,
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    given = {"models": models, "datasets": datasets, "seed": seed}
    return {**block, **{key: value for key, value in given.items() if value is not None}}


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"optimum_arb": __version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": str(torch.__version__)}  # PyPI's builds are for CUDA, which their metadata does not say


def command_line(whole_paths: bool = True) -> str:
    """The command that this process runs, as a shell takes it.

    Reports are sent and uploaded: tokens of the Hub, values of options that are named after a secret, and the code of
    `python -c` are left out of it.
    """
    words = [_TOKEN.sub("...", word) for word in sys.orig_argv]
    words[0] = Path(words[0]).name
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if (_SECRET.fullmatch(before) and not word.startswith("-")) or before == "-c":
            words[index] = "..."
        elif _SECRET.fullmatch(word.partition("=")[0]) and "=" in word:
            words[index] = word.partition("=")[0] + "=..."
    if not whole_paths:
        words = [_PATH.sub(r"\1\2", word) for word in words]
    return shlex.join(words)


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def model_facts(
    name: str,
    revision: str | None = None,
    directory: Path | None = None,
    digest: Callable[[Path], str] | None = None,
) -> dict[str, Any]:
    """What identifies a model: its name, its revision on the Hub, and the fingerprint of its files.

    Args:
        name: directory or Hub name. Of a name, the files in the cache are looked at, nothing is downloaded.
        revision: the commit that was loaded.
        directory: where its files lie, if that is known: a subfolder of what is called `name`.
        digest: as `model_fingerprint` takes it.
    """
    facts: dict[str, Any] = {"name": name}
    if revision is not None:
        facts["revision"] = revision
    directory = directory or model_directory(name, revision)
    if directory is not None:
        facts["fingerprint"] = model_fingerprint(directory, digest)
    return facts


def model_directory(name: str, revision: str | None = None) -> Path | None:
    """Where the files of a model lie: its directory, or its snapshot in the cache of the Hub; None if neither."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    found = cached_file(
        name,
        "config.json",
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).parent


def model_fingerprint(directory: str | Path, digest: Callable[[Path], str] | None = None) -> str:
    """SHA-256 over the names and contents of a model's `config.json` and weights, as "sha256:...".

    Every byte counts. A file in the cache of the Hub carries the SHA-256 of its content in the name of its blob, which
    is taken as it is.

    Args:
        directory: of the model.
        digest: gives the SHA-256 of a file, called from several threads; `content_digest` unless given.
    """
    total = hashlib.sha256()
    files = sorted(Path(directory).iterdir())
    files = [file for file in files if file.name == "config.json" or file.suffix in _WEIGHTS]
    # a thread hashes 1 GB a second: 13 s for the files of a 7B
    with ThreadPoolExecutor(min(_HASHED_AT_ONCE, os.cpu_count() or 1)) as pool:
        for file, found in zip(files, pool.map(digest or content_digest, files), strict=True):
            total.update(f"{file.name} {found}\n".encode())
    return f"sha256:{total.hexdigest()}"


def content_digest(file: Path) -> str:
    """SHA-256 of the content of a file."""
    if (known := recorded_digest(file)) is not None:
        return known
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def recorded_digest(file: Path) -> str | None:
    """What the cache of the Hub calls a file, the SHA-256 of its content; None of a file elsewhere."""
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return None


def text_fingerprint(content: str) -> str:
    """SHA-256 of a text in UTF-8, as "sha256:..."."""
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
