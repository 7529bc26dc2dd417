"""`estimate`: the figures, the limits and their exit code."""

from __future__ import annotations

import pytest

from optimum_arb.commands.estimate import duration, parse_size
from optimum_arb.commands.main import main


def test_estimate(call, float_model):
    options = ("--planes", 2, "--num-samples", 2, "--sequence-length", 32, "--no-probe")
    text = call("estimate", float_model, *options)
    assert "true bits per weight" in text
    assert "bytes of the files" in text
    result = call("estimate", float_model, *options, "--json")
    assert result["modules"] == 14
    assert result["calibration_tokens"] == 64
    assert result["seconds"] is None
    assert result["over_limits"] == []


def test_limits_decide_the_exit_code(call, float_model, capsys):
    options = ["estimate", str(float_model), "--no-probe", "--memory-limit"]
    call(*options, "1TB")
    assert main([*options, "1MB"]) == 1
    assert "more than --memory-limit" in capsys.readouterr().out


def test_bad_input(fail, float_model, binarized_model):
    assert "'lots' is no size" in fail("estimate", float_model, "--memory-limit", "lots")
    for size in ("", ".", "1.2.3GB"):
        assert f"{size!r} is no size" in fail("estimate", float_model, "--no-probe", "--memory-limit", size)
    assert "is already quantized" in fail("estimate", binarized_model, "--no-probe")
    assert "--device-map 'auto' cannot be estimated" in fail("estimate", float_model, "--device-map", "auto")
    for dtype in ("int8", "nope"):
        assert f"dtype='{dtype}' is unknown" in fail("estimate", float_model, "--no-probe", "--dtype", dtype)
    assert "does nothing with --no-calibration" in fail("estimate", float_model, "--no-calibration", "--seed", 1)
    assert "--gpu-memory does nothing with --device-map cpu" in fail("estimate", float_model, "--gpu-memory", "1GB")


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("1.5GB", 1_500_000_000), ("512MB", 512_000_000), ("7", 7), ("2k", 2000), ("1TB", 10**12)],
)
def test_sizes(text, count):
    assert parse_size(text) == count


def test_durations():
    assert [duration(s) for s in (1.25, 99.0, 120, 7200)] == ["1.2 s", "99.0 s", "2.0 min", "2.0 h"]
