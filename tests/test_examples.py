"""The example scripts, on models that are made on the spot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_lora_recovery(tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, str(EXAMPLES / "lora_recovery.py"), "--smoke", "--directory", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(\S.*?)  +([\d,.]+)  +(?:\d+|-)$", run.stdout, re.MULTILINE)
    perplexities = {name: float(value.replace(",", "")) for name, value in rows}
    before = perplexities["binarized, 1 plane"]
    after = perplexities["with the adapter"]
    assert after < 0.9 * before
    assert perplexities["merged by dequantizing (float weights)"] == pytest.approx(after, rel=1e-3)
    assert perplexities["merged by binarizing again"] < before
    assert "adapters merged by binarizing again" in run.stdout
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["quant_method"] == "arb"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
