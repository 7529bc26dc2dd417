"""benchmarks/tiny_families.py and second_family.py with models that train for a few steps."""

from __future__ import annotations

import json

import pytest
import torch

from optimum_arb.data import bundled_text


@pytest.fixture(scope="module")
def scripts(script):
    return script("tiny_families"), script("second_family")


@pytest.fixture
def small(scripts, monkeypatch):
    """The same with models of 64 columns and little text."""
    families, study = scripts
    text = bundled_text("wikitext-2")[:70_000]
    split = families.Split(text[:40_000], text[40_000:60_000], text[60_000:])
    arguments = {
        "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 256},
        "gpt-neox": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
        },
    }
    known = {name: (*families.FAMILIES[name][:2], given) for name, given in arguments.items()}
    monkeypatch.setattr(families, "FAMILIES", known)
    monkeypatch.setattr(families, "split_text", lambda: split)
    monkeypatch.setattr(study, "split_text", lambda: split)
    monkeypatch.setattr(study, "SAMPLES", 16)
    return families, study


def test_the_parts_of_the_text_are_all_of_it(scripts):
    families, _ = scripts
    parts = families.split_text()
    text = bundled_text("wikitext-2")
    assert "".join(parts) == text
    assert [round(len(part) / len(text), 2) for part in parts] == [0.8, 0.1, 0.1]


def test_every_row_is_a_configuration(scripts):
    _, study = scripts
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    made = {name: make(tokens) for name, make in study.configurations().items() if make is not None}
    assert made["arb-hrc-2"].resolved_error_correction > 0
    assert made["arb-hrc-2-uncorrected"].resolved_error_correction == 0
    assert made["arb-hrc-1-refined"].refine == "block"
    assert {config.method for config in made.values()} == {"rtn", "billm", "arb-rc", "arb-hrc", "arb-dbf"}


def test_unigrams(scripts):
    _, study = scripts
    training = torch.tensor([0, 0, 1])
    assert study.unigram_perplexity(training, torch.tensor([0, 0]), 2) == pytest.approx(5 / 3)


def test_training_lowers_the_loss_and_is_repeatable(small):
    families, _ = small
    tokenizer = families.make_tokenizer(families.split_text().training)
    tokens = families.token_ids(tokenizer, families.split_text().training)
    losses = [families.train(families.untrained("gpt2", 0), tokens, 10) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.3


def test_a_study(small, tmp_path, capsys):
    _, study = small
    arguments = ["--out", str(tmp_path), "--steps", "8", "--rows", "full-precision,rtn,arb-hrc-1,arb-hrc-1-refined"]
    study.main([*arguments, "--refine-steps", "4"])
    printed = capsys.readouterr().out
    for family in ("gpt2", "gpt-neox"):
        rows = {path.stem: json.loads(path.read_text()) for path in (tmp_path / family).glob("*.json")}
        assert set(rows) == {"full-precision", "rtn", "arb-hrc-1", "arb-hrc-1-refined"}
        assert 1 < rows["rtn"]["bits_per_weight"] < rows["arb-hrc-1"]["bits_per_weight"]
        assert rows["arb-hrc-1-refined"]["config"]["refine_steps"] == 4
        for row in rows.values():
            assert f"{row['perplexity']['perplexity']:,.2f}" in printed
            assert row["training"]["family"] == family
    before = (tmp_path / "gpt2" / "rtn.json").stat().st_mtime_ns
    study.main([*arguments, "--refine-steps", "4", "--families", "gpt2"])
    assert (tmp_path / "gpt2" / "rtn.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="remove it or write elsewhere"):
        study.main([*arguments, "--steps", "9", "--families", "gpt2"])


def test_what_is_refused(scripts, tmp_path, capsys):
    _, study = scripts
    for arguments, message in (
        (["--families", "nonsense"], "unknown family 'nonsense'"),
        (["--rows", "nonsense"], "unknown row 'nonsense'"),
    ):
        with pytest.raises(SystemExit):
            study.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 100 tokens, not 128 x 256"):
        study.calibration_tokens(torch.zeros(100, dtype=torch.int64))
