"""The memory that a model takes, measured in a process of its own, where nothing else counts; its bytes on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..reproduce import model_directory

NEW_TOKENS = 8  # generated after the prompt
WORKER = "optimum_arb.evaluate.memory_worker"
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def disk_bytes(name: str) -> dict[str, int] | None:
    """The files of a model: `weights` (safetensors and the like), and `files`, all of its directory's top level.

    Args:
        name: directory, or Hub name, whose files in the cache are counted.

    Returns:
        None where nothing of it lies on this machine.
    """
    directory = model_directory(name)
    if directory is None:
        return None
    files = [file for file in directory.iterdir() if file.is_file()]
    weights = sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS)
    return {"weights": weights, "files": sum(file.stat().st_size for file in files)}


def measure_memory(
    name: str,
    dtype: str = "auto",
    device_map: str = "cpu",
    backend: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = NEW_TOKENS,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Loads a model in a fresh process, generates a few tokens there, and tells what that took.

    Args:
        name, dtype, device_map, backend: as of `commands.loading.load_model`.
        prompt_tokens: of the one sequence that is run.
        new_tokens: tokens generated after it.
        timeout: seconds after which it is given up.

    Returns:
        Bytes: `parameters` (parameters and buffers), `resident` (the process's memory beyond what it had before the
        model was loaded, after generating), `private` (of it, what no other process shares and no file backs; None
        where the system does not tell), `peak_loading` and `peak` (the most until the model was loaded, and until the
        end, likewise beyond what was there before; the first is None where the system cannot reset its mark); with a
        GPU `gpu_resident` and `gpu_peak` of torch's allocator over all GPUs, else None; and `seconds` of loading.

    Raises:
        RuntimeError: the process failed; the message has its last line.
    """
    options = {
        "name": name,
        "dtype": dtype,
        "device_map": device_map,
        "backend": backend,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
    # this package may be imported from a checkout that is not installed
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", WORKER, json.dumps(options)]
    try:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"The memory of {name} could not be measured within {timeout:.0f} seconds.") from None
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise RuntimeError(f"The memory of {name} could not be measured, the process for it failed: {reason}")
    return json.loads(lines[-1])
