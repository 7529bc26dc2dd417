"""Some of what benchmarks/kill_saves.py does two hundred times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_saves.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it counts operations and limits memory as Linux does")
def test_saves_that_are_killed():
    command = [sys.executable, str(SCRIPT), "--trials", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"^30 saves were stopped; 30 left what they may leave, 0 did not\.$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^\| .*\| 0 \|$", done.stdout, re.MULTILINE)) >= 15  # ways and stops, none with another end
