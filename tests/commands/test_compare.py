"""`compare`: the table, the files, going on after an interruption, and what is refused."""

from __future__ import annotations

import json

import pytest

from optimum_arb import ARBConfig
from optimum_arb.commands.main import main
from optimum_arb.evaluate import compare as engine
from optimum_arb.evaluate.compare import Settings, parse_row

OPTIONS = ("--num-samples", 2, "--sequence-length", 32, "--context-length", 32, "--max-windows", 2)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the lobster is a species of lobster " * 60)
    return path


@pytest.fixture
def options(float_model, text, tmp_path):
    return ("compare", float_model, *OPTIONS, "--eval", text, "--out", tmp_path / "out", "--no-plot")


def test_rows_by_name():
    settings = Settings("model", num_samples=7)
    assert parse_row("full", settings).config is None
    assert parse_row("arb-hrc:2", settings).config.planes == 2
    assert parse_row("arb-rc:published", settings).config.compensation == "diagonal"
    assert parse_row("arb-rc", settings).config.to_dict() == ARBConfig(method="arb-rc", num_samples=7).to_dict()
    assert parse_row("gguf", settings).config.layout.name == "planes-1"
    assert parse_row("hqq:2", settings).hqq_bits == 2
    for name in ("arb-hrc:4", "rtn:1", "hqq", "gptq", "rtn:published", "", "arb-hrc:", "arb-hrc:hadamard=128:2"):
        with pytest.raises(ValueError, match="is no row of the comparison"):
            parse_row(name, settings)


def test_rows_with_further_choices():
    settings = Settings("model", num_samples=7)
    config = parse_row("arb-hrc:2:hadamard=128:scale_bits=8", settings).config
    assert config.to_dict() == ARBConfig(planes=2, hadamard=128, scale_bits=8, num_samples=7).to_dict()
    config = parse_row("arb-dbf:0.84:refine=block:refine_steps=9", settings).config
    expected = ARBConfig(method="arb-dbf", factor_bits=0.84, refine="block", refine_steps=9, num_samples=7)
    assert config.to_dict() == expected.to_dict()
    config = parse_row("arb-hrc:target_bits_per_weight=2.3", settings).config
    assert config.to_dict() == ARBConfig(target_bits_per_weight=2.3, num_samples=7).to_dict()
    for name in ("arb-hrc:2:seed=1", "arb-hrc:2:planes=3", "arb-rc:nonsense=1", "arb-hrc:hadamard=64:hadamard=128"):
        with pytest.raises(ValueError, match="is no further choice of ARBConfig"):
            parse_row(name, settings)
    with pytest.raises(ValueError, match="hadamard"):
        parse_row("arb-hrc:2:hadamard=100", settings)
    for name in ("gguf:hadamard=128", "hqq:2:hadamard=128", "full:hadamard=128", "arb-rc:published:hadamard=128"):
        with pytest.raises(ValueError, match="is no row of the comparison"):
            parse_row(name, settings)


def test_the_table(call, options, tmp_path):
    text = call(*options, "--methods", "rtn,arb-hrc:1")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["full", "rtn", "arb-hrc:1"]
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert rows["full"]["bits_per_weight"] == 32
    assert rows["rtn"]["bits_per_weight"] < rows["arb-hrc:1"]["bits_per_weight"] < 3
    assert rows["arb-hrc:1"]["model_bytes"] < rows["full"]["model_bytes"]
    assert f"{rows['rtn']['perplexity']['perplexity']:,.2f}" in (tmp_path / "out" / "compare.md").read_text()


def test_finished_rows_are_not_measured_again(call, options, monkeypatch, tmp_path):
    first = call(*options, "--methods", "rtn", "--json")["rows"]
    measured = []
    original = engine._measure

    def measure(row, *rest):
        measured.append(row.name)
        if row.name == "arb-hrc:1":
            raise KeyboardInterrupt
        return original(row, *rest)

    monkeypatch.setattr(engine, "_measure", measure)
    assert main([str(part) for part in (*options, "--methods", "rtn,gguf,arb-hrc:1")]) == 130
    assert measured == ["gguf", "arb-hrc:1"]
    monkeypatch.setattr(engine, "_measure", original)
    rows = call(*options, "--methods", "arb-hrc:1,gguf,rtn", "--json")["rows"]
    assert list(rows) == ["full", "arb-hrc:1", "gguf", "rtn"]
    assert rows["rtn"] == first["rtn"]


def test_rows_of_other_settings_are_refused(call, fail, options, text, float_model):
    call(*options, "--methods", "rtn")
    assert "max_windows=2, and now max_windows=1" in fail(*options, "--methods", "rtn", "--max-windows", 1)
    text.write_text("another lobster " * 100)
    assert "holds rows with text='text.txt sha256:" in fail(*options, "--methods", "rtn")


def test_a_failed_row_is_told_and_tried_again(call, options, monkeypatch, capsys):
    original = engine._measure

    def measure(row, *rest):
        if row.name == "rtn":
            raise ImportError("nothing there")
        return original(row, *rest)

    monkeypatch.setattr(engine, "_measure", measure)
    assert main([str(part) for part in (*options, "--methods", "rtn")]) == 1
    assert "rtn: nothing there" in capsys.readouterr().out
    monkeypatch.setattr(engine, "_measure", original)
    assert "error" not in call(*options, "--methods", "rtn", "--json")["rows"]["rtn"]


def test_bad_input(fail, options, binarized_model, tmp_path):
    assert "'gptq' is no row" in fail(*options, "--methods", "rtn,gptq")
    assert not (tmp_path / "out").exists()
    assert "--out has an empty name" in fail(*options, "--out", "")
    assert "text.txt is a file" in fail(*options, "--out", tmp_path / "text.txt")
    assert "dataset='nope' is neither a file" in fail(*options, "--methods", "rtn,arb-hrc:1", "--dataset", "nope")
    assert "--methods names no method" in fail(*options, "--methods", " ,")
    assert "is already quantized (arb)" in fail("compare", binarized_model, *options[2:])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text("{")
    assert "is damaged" in fail(*options, "--methods", "rtn")


def test_a_peer_that_is_not_installed(options, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "hqq", None)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    assert main([str(part) for part in (*options, "--methods", "hqq:2")]) == 1
    assert "pip install hqq" in capsys.readouterr().out


def test_hqq(call, options):
    pytest.importorskip("hqq.core.quantize")
    row = call(*options, "--methods", "hqq:2", "--json")["rows"]["hqq:2"]
    assert row["bits_per_weight"] == 2.5  # 2 and two float16 numbers a group of 64
    assert row["perplexity"]["perplexity"] > 1
