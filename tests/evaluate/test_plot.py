import sys

import pytest

from optimum_arb.evaluate.plot import plot_comparison


def row(bits, perplexity):
    return {"bits_per_weight": bits, "perplexity": {"perplexity": perplexity}}


ROWS = {
    "full": row(32, 20.0),
    "rtn": row(1.1, 5e5),
    "arb-hrc:2": row(2.3, 60.0),
    "arb-rc": row(2.9, float("inf")),
    "hqq:2": {"error": "not installed"},
}


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = plot_comparison(ROWS, tmp_path, "a model")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "arb-hrc:2" in text
    assert "full precision: 20.00" in text
    assert "hqq:2" not in text
    before = svg.read_bytes()
    plot_comparison(ROWS, tmp_path, "a model")
    assert len(svg.read_bytes()) == len(before)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="optimum-arb\\[plot\\]"):
        plot_comparison(ROWS, tmp_path, "a model")
