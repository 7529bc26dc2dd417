"""The whole way on a real model: binarized, evaluated beside its base, held against thresholds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from optimum_arb.commands.main import main

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sys.path.insert(0, EXAMPLES)
    try:
        from smollm2 import gguf_path, smollm2
    finally:
        sys.path.remove(EXAMPLES)
    try:
        gguf_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return smollm2(tmp_path_factory.mktemp("smollm2") / "float")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_round_to_nearest_is_measured_as_broken_and_refused(model, tmp_path, capsys):
    """Data-free round-to-nearest ruins this model (a perplexity of 571,376 in the README): every figure says so."""
    pytest.importorskip("matplotlib")
    packed = tmp_path / "rtn"
    assert main(["quantize", str(model), str(packed), "--method", "rtn", "--block-size", "-1", "--no-calibration"]) == 0
    options = ["--context-length", "256", "--max-windows", "4", "--batch-sizes", "1", "--repeats", "1"]
    options += ["--prompt-tokens", "32", "--new-tokens", "4", "--sample-tokens", "8", "--energy-seconds", "0.5"]
    arguments = ["evaluate", str(packed), "--baseline", str(model), *options, "--report", str(tmp_path / "report")]
    assert main(arguments) == 0
    base, found = json.loads((tmp_path / "report" / "report.json").read_text())["models"]
    assert 20 < base["perplexity"][0]["perplexity"] < 40
    (apart,) = found["divergence"]
    assert apart["perplexity_ratio"] > 1000
    assert apart["kl_divergence"] > 4
    assert apart["top1_agreement"] < 0.1
    assert found["bits_per_weight"] == pytest.approx(1.0234, abs=0.002)
    assert found["memory"]["resident"] < 0.5 * base["memory"]["resident"]
    assert found["disk"]["weights"] < 0.3 * base["disk"]["weights"]
    assert len(found["modules"]) == 210
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 3
    thresholds = tmp_path / "verify.toml"
    thresholds.write_text(
        "max_bits_per_weight = 1.1\nmin_top1_agreement = 0.5\n[measure]\ncontext_length = 256\nmax_windows = 2"
    )
    capsys.readouterr()
    check = ["verify", str(packed), "--baseline", str(model), "--thresholds", str(thresholds), "--json"]
    assert main(check) == 1
    assert [c["passed"] for c in json.loads(capsys.readouterr().out)["checks"]] == [True, False]
