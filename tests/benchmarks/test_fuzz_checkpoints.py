"""Some of what benchmarks/fuzz_checkpoints.py does by the thousand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_checkpoints.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it measures and limits memory as Linux does")
def test_a_hundred_changes():
    command = [sys.executable, str(SCRIPT), "--mutations", "100", "--seed", "7", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    row = re.search(r"^\| \*\*all\*\* \| 100 \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| 0 \|$", done.stdout, re.MULTILINE)
    assert row is not None, done.stdout
    ours, library, configuration, loaded = map(int, row.groups())
    assert ours + library + configuration + loaded == 100
    assert ours > library  # most of what is wrong is found by this package, before anything loads
    assert loaded > 0  # and what is right still loads
