"""Runs Python in a process of its own, as a user has it: what was imported and set here does not count there."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import tomllib

ROOT = Path(__file__).resolve().parents[1]
# What decides how transformers and the Hub's client behave; each test sets what it needs.
CLEARED = ("HF_", "TRANSFORMERS_", "OPTIMUM_ARB_", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTEST_", "XDG_CACHE_HOME")


def python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Runs `code` with `arguments` in `sys.argv[1:]` and these environment variables; does not check its exit code."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(CLEARED)}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([*installation(), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=240, check=False)


@cache
def installation() -> tuple[str, ...]:
    """What must come first in `sys.path` so that this checkout counts as installed, with its entry points.

    Nothing where it is installed. Otherwise the checkout and a folder with the metadata that its installation would
    have.
    """
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": declared["scripts"], **declared["entry-points"]}
    found = {point.group: point.value for point in importlib.metadata.distribution("optimum-arb").entry_points}
    import optimum_arb

    here = Path(optimum_arb.__file__).parents[1] == ROOT
    if here and not os.environ.get("PYTHONPATH") and all(group in found for group in groups):
        return ()
    folder = Path(mkdtemp()) / "site"
    metadata = folder / f"optimum_arb-{declared['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: optimum-arb\nVersion: {declared['version']}\n")
    lines = [
        line for group, points in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return str(folder), str(ROOT)
