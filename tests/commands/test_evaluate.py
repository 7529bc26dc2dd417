"""`evaluate`: the numbers of the library function, for float and binarized models."""

from __future__ import annotations

import os

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb.commands.main import main
from optimum_arb.evaluate import perplexity


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the lobster is a species of lobster " * 60)
    return path


@pytest.mark.parametrize("which", ["float_model", "binarized_model"])
def test_json_agrees_with_the_library(call, request, text, which):
    directory = request.getfixturevalue(which)
    result = call("evaluate", directory, "--text", text, "--context-length", 16, "--max-windows", 5, "--json")
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = perplexity(model, AutoTokenizer.from_pretrained(directory), text, context_length=16, max_windows=5)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (result["tokens"], result["windows"], result["text"]) == (75, 5, "text.txt")
    assert (result["bits_per_weight"] is None) == (which == "float_model")


def test_readable_output_states_text_tokens_and_context(call, binarized_model, text):
    out = call("evaluate", binarized_model, "--text", text, "--max-windows", 2)
    assert "126 in 2 windows of 64" in out  # the default context is cut to the model's positions
    assert "text.txt" in out
    assert "true bits per weight" in out
    assert "calibrated on" in out


def test_backend(call, fail, binarized_model, float_model, text):
    options = ("--text", text, "--max-windows", 2, "--json")
    reference = call("evaluate", binarized_model, *options, "--backend", "reference")
    dense = call("evaluate", binarized_model, *options, "--backend", "dequantize")
    assert dense["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)
    assert "is for binarized models" in fail("evaluate", float_model, *options, "--backend", "reference")


def test_bad_input(fail, float_model, text, tmp_path):
    assert "neither a file nor a bundled text" in fail("evaluate", float_model, "--text", "no-such-text")
    assert "more than the 64 positions" in fail("evaluate", float_model, "--context-length", 128, "--text", text)
    for more in ((), ("--measure", "perplexity,generation")):
        assert "context_length=0" in fail("evaluate", float_model, "--context-length", 0, "--text", text, *more)
    for option, value in (("sample-tokens", "0"), ("energy-seconds", "nan"), ("energy-seconds", "0"), ("repeats", "0")):
        message = fail("evaluate", float_model, "--text", text, f"--{option}", value)
        assert f"{option.replace('-', '_')}={value}" in message.replace("=0.0", "=0")
    assert "A prompt is empty" in fail("evaluate", float_model, "--measure", "generation", "--prompt", "")
    assert "--max-perplexity nan is no bound" in fail(
        "evaluate", float_model, "--text", text, "--max-perplexity", "nan"
    )
    assert "leaves nothing to measure" in fail("evaluate", float_model, "--text", text, "--leave-out", "perplexity")
    text.write_text("the lobster")
    assert "fewer than one window" in fail("evaluate", float_model, "--text", text)
    assert "There is no model directory" in fail("evaluate", tmp_path / "missing")


def test_what_the_model_lacks_is_told_before_measuring(fail, float_model, text, monkeypatch):
    monkeypatch.setattr("optimum_arb.evaluate.evaluation._load", lambda *a: pytest.fail("loaded"))
    options = ("evaluate", float_model, "--text", text, "--measure")
    assert "more than the 64 positions" in fail(*options, "perplexity,latency", "--prompt-tokens", 60)
    assert "more than the 64 positions" in fail(*options, "perplexity,generation", "--context-length", 65)
    assert "has no chat template" in fail(*options, "perplexity,generation", "--chat")
    assert "seed=9223372036854775808" in fail(*options, "generation", "--seed", 2**63)


def test_what_a_report_lacks_is_told_before_measuring(fail, float_model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optimum_arb.evaluate.evaluation.evaluate", lambda *a, **k: pytest.fail("measured"))
    assert "empty name" in fail("evaluate", float_model, "--text", text, "--report", "")
    text.with_name("file").write_text("")
    report = text.with_name("file") / "folder" / "report.json"
    assert "file is a file" in fail("evaluate", float_model, "--text", text, "--report", report)
    assert "text.txt is no result of compare" in fail("evaluate", float_model, "--text", text, "--compare", text)
    assert "no comparison missing" in fail("evaluate", float_model, "--text", text, "--compare", "missing")


def test_a_bound_on_the_perplexity_decides_the_exit_code(call, float_model, text, capsys):
    options = ["evaluate", str(float_model), "--text", str(text), "--max-windows", "2"]
    assert "at most 1,000,000.00" in call(*options, "--max-perplexity", "1e6")
    assert main([*options, "--max-perplexity", "1"]) == 1
    assert "above 1.00" in capsys.readouterr().out


def test_a_model_that_cannot_be_written_is_told_before_the_work(fail, binarized_model, text, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # a user of these tests may write everywhere
    monkeypatch.setattr("optimum_arb.commands.loading.load_model", None)
    message = fail("evaluate", binarized_model, "--text", text, "--record")
    assert "config.json cannot be written" in message
