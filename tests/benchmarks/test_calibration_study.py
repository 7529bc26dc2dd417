"""benchmarks/calibration_study.py on a tiny model and short texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def study(script):
    return script("calibration_study")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("study") / "model", "LlamaForCausalLM", tokenizer=True)


@pytest.fixture
def short(study, monkeypatch):
    """Texts that are tokenized in no time."""
    texts = study.bundled_text("wikitext-2")[:20_000], study.python_documentation()[:20_000]
    monkeypatch.setattr(study, "bundled_text", lambda name: texts[0])
    monkeypatch.setattr(study, "python_documentation", lambda: texts[1])


def test_names_of_rows(study):
    for calibration in study.calibrations():
        assert study.Calibration.parse(calibration.name) == calibration
    for name in ("wikitext", "c4-8x16", "wikitext-0x16", "wikitext-8x16x2"):
        with pytest.raises(ValueError, match="is no row"):
            study.Calibration.parse(name)


def test_what_a_set_is_made_of(study):
    texts = study.Texts(torch.arange(100), torch.arange(1000, 1100))
    mixed = study.calibration_set(study.Calibration("mixed", 3, 4), texts, 10)
    assert mixed.tolist() == [[0, 1, 2, 3], [1000, 1001, 1002, 1003], [4, 5, 6, 7]]
    documentation = study.calibration_set(study.Calibration("python-docs", 2, 2), texts, 10)
    assert documentation.tolist() == [[1000, 1001], [1002, 1003]]
    drawn = study.calibration_set(study.Calibration("random", 30, 4), texts, 10)
    assert drawn.shape == (30, 4)
    assert drawn.unique().tolist() == list(range(10))
    with pytest.raises(ValueError, match="wikitext-8x16: the text to calibrate on has 100 tokens"):
        study.calibration_set(study.Calibration("wikitext", 8, 16), texts, 10)


def test_the_halves_share_nothing(study, monkeypatch):
    monkeypatch.setattr(study, "bundled_text", lambda name: "".join(f"line {i:03d}\n" for i in range(100)))
    monkeypatch.setattr(study, "python_documentation", lambda: "another text" * 20)

    def tokenizer(text, **options):
        return {"input_ids": [ord(letter) for letter in text]}

    whole = [study.halves(tokenizer, 0.0), study.halves(tokenizer, 0.5)]
    for (first, second), start in zip(whole, (0, 51), strict=True):  # the line that character 450 is in is left out
        text = "".join(map(chr, [*first.wikitext.tolist(), *second.wikitext.tolist()]))
        assert text == "".join(f"line {i:03d}\n" for i in range(start, 100))
        assert "".join(map(chr, [*first.documentation.tolist(), *second.documentation.tolist()])) == (
            "another text" * 20
        )


def test_a_study(study, short, model, tmp_path, capsys):
    names = ["full-precision", "wikitext-4x32", "python-docs-4x32"]
    arguments = [str(model), "--out", str(tmp_path), "--context-length", "32", "--windows", "2", "--skip", "0.2"]
    study.main([*arguments, "--rows", ",".join(names[:2])])
    before = (tmp_path / "wikitext-4x32.json").stat().st_mtime_ns
    capsys.readouterr()
    study.main([*arguments, "--rows", ",".join(names)])
    assert (tmp_path / "wikitext-4x32.json").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 + len(names)
    for name in names:
        row = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(row["perplexity"]) == ["wikitext", "python-docs"]
        for found in row["perplexity"].values():
            assert found["windows"] == 2
            assert f"{found['perplexity']:,.2f}" in printed
    study.main([*arguments, "--rows", "wikitext-4x32", "--config", '{"planes": 2}'])
    assert json.loads((tmp_path / "wikitext-4x32.json").read_text())["config"]["planes"] == 2


def test_rows_side_by_side(study, tmp_path, monkeypatch, capsys):
    """Each row is a process of one row; one that fails is named at the end, and the others are printed."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if "random-4x32" not in command:
            monkeypatch.setattr(study, "measure", lambda *_: {"perplexity": {"wikitext": {"perplexity": 12.5}}})
            monkeypatch.setattr(study, "halves", lambda *_: (None, None))
            monkeypatch.setattr(study.AutoTokenizer, "from_pretrained", lambda _: [])
            study.main(command[2:])

    monkeypatch.setattr(study.subprocess, "run", run)
    with pytest.raises(SystemExit, match="Not measured, see above: random-4x32"):
        study.main(["m", "--out", str(tmp_path), "--rows", "full-precision,random-4x32", "--jobs", "2"])
    assert "| (full precision) | - | - | - | - | 12.50 |" in capsys.readouterr().out
    assert sorted(command[command.index("--rows", 8) + 1] for command in commands) == ["full-precision", "random-4x32"]


def test_what_is_refused(study, short, model, tmp_path, capsys):
    for rows, message in (("nonsense", "'nonsense' is no row"), ("wikitext-100000x1024", "not 100000 x 1024")):
        with pytest.raises(SystemExit):
            study.main([str(model), "--out", str(tmp_path), "--rows", rows])
        assert message in capsys.readouterr().err
