"""benchmarks/fit_study.py on a tiny model and tiny shapes."""

from __future__ import annotations

import json

import pytest
from tiny_models import save_tiny

from optimum_arb import ARBConfig
from optimum_arb.algorithms import admm


@pytest.fixture(scope="module")
def study(script):
    return script("fit_study")


def test_every_row_is_a_configuration(study):
    for row in study.rows().values():
        ARBConfig(**row.choices)
        with study.constants(row.constants):
            pass


def test_constants_come_back(study):
    before = admm.HIGHEST_RHO
    with study.constants({"admm.HIGHEST_RHO": 2.0}):
        assert admm.HIGHEST_RHO == 2.0
    assert before == admm.HIGHEST_RHO


def test_a_model(study, tmp_path, capsys):
    source = save_tiny(tmp_path / "model", "LlamaForCausalLM", tokenizer=True)
    out = tmp_path / "figures.json"
    names = ["loop-1", "hadamard-2", "scales-8-1", "rho-0.3", "factors-rounds-40"]
    chosen = ["--rows", ",".join(names), "--config", '{"method": "rtn"}']
    linears = ["--linears", "layers.0.self_attn.q_proj,layers.1.mlp.down_proj"]
    study.main([str(source), *linears, *chosen, "--samples", "4", "--length", "32", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["config", *names]
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(rows)
    for row in rows.values():
        assert len(row["errors"]) == 2
        assert row["held_out_error"] == pytest.approx(sum(row["errors"].values()) / 2)
        assert 0 < row["held_out_error"] < 1
    assert rows["hadamard-2"]["held_out_error"] < rows["loop-1"]["held_out_error"]
    assert rows["scales-8-1"]["bits_per_weight"] < rows["rho-0.3"]["bits_per_weight"] < 4


PAGE = """\
{note}
<!-- table:begin benchmarks/fit_study.py -->
| fit | row | true bits | held-out error |
|---|---|---|---|
| a | `loop-1` | 9 | .9 |
| b | `scales-8-1` | - | - |
<!-- table:end -->
| outside | `loop-1` | 9 | .9 |
"""


def test_a_page_is_filled(study, tmp_path):
    source = save_tiny(tmp_path / "model", "LlamaForCausalLM", tokenizer=True)
    page, out = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(PAGE.format(note="<!-- note:begin benchmarks/fit_study.py -->\nold\n<!-- note:end -->"))
    small = ["--linears", "layers.1.mlp.down_proj", "--samples", "4", "--length", "32"]
    study.main([str(source), *small, "--page", str(page), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["loop-1", "scales-8-1"]
    lines = page.read_text().splitlines()
    for label, name in (("a", "loop-1"), ("b", "scales-8-1")):
        bits, error = rows[name]["bits_per_weight"], rows[name]["held_out_error"]
        assert f"| {label} | `{name}` | {bits:.3f} | {f'{error:.4f}'.removeprefix('0')} |" in lines
    assert lines[-1] == "| outside | `loop-1` | 9 | .9 |"
    note = " ".join(lines[1 : lines.index("<!-- note:end -->")])
    assert "old" not in note
    assert "4 x 32 tokens: `layers.1.mlp.down_proj`" in note
    page.write_text(PAGE.format(note=""))
    with pytest.raises(ValueError, match="has no <!-- note:begin"):
        study.filled(page.read_text(), rows, "new")


def test_what_is_refused(study, tmp_path, capsys):
    source = save_tiny(tmp_path / "model", "LlamaForCausalLM", tokenizer=True)
    for arguments, message in (
        ([], "give a MODEL, or --shapes"),
        ([str(source), "--rows", "nonsense"], "unknown row 'nonsense'"),
        ([str(source), "--linears", "nonsense"], "'nonsense' matches no linear"),
        ([str(source), "--samples", "1000000"], "1000000 x 1024"),
    ):
        with pytest.raises(SystemExit):
            study.main(arguments)
        assert message in capsys.readouterr().err


def test_shapes(study, tmp_path):
    out = tmp_path / "figures.json"
    study.main(["--shapes", "80x64*3,48x128", "--layers", "5", "--rows", "time-hrc,time-dbf", "--out", str(out)])
    for row in json.loads(out.read_text())["rows"].values():
        seconds = row["seconds_of_shapes"]
        assert row["seconds_of_model"] == pytest.approx(5 * (3 * seconds["80x64"] + seconds["48x128"]))
        assert row["gpu_bytes"] is None
