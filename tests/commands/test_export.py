"""`export`: a file, what it says of it, and what it refuses."""

from __future__ import annotations

import pytest
from gguf_models import save_model

from optimum_arb.commands.main import main

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def for_gguf(tmp_path_factory):
    """Binarized on the command line as the help of export says."""
    root = tmp_path_factory.mktemp("export")
    save_model(root / "float", num_hidden_layers=1)
    from gguf_models import byte_level_tokenizer
    from tokenizers import pre_tokenizers

    byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(root / "float")
    options = ["--no-col-scale", "--no-act-order", "--num-samples", "2", "--sequence-length", "32"]
    assert main(["quantize", str(root / "float"), str(root / "model"), *options]) == 0
    return root / "model"


def test_export(for_gguf, call, tmp_path):
    text = call("export", for_gguf, tmp_path / "m.gguf")
    assert "all as in the model" in text
    assert "1.1250 in the file" in text
    assert "Q1_0" in text
    result = call("export", for_gguf, tmp_path / "n.gguf", "--to", "gguf", "--no-tokenizer", "--json")
    assert result["exact"] is True
    assert result["tokenizer"] is False
    assert result["file_bytes"] == (tmp_path / "n.gguf").stat().st_size


def test_lossy_only_where_it_is_allowed(for_gguf, call, fail, tmp_path):
    options = ("export", for_gguf, tmp_path / "m.gguf", "--embedding-type", "F16")
    assert "would not be exact" in fail(*options)
    assert not (tmp_path / "m.gguf").exists()
    text = call(*options, "--allow-lossy")
    assert "NOT all as in the model" in text


def test_bad_input(for_gguf, float_model, fail, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"mine")
    assert "already exists" in fail("export", for_gguf, tmp_path / "m.gguf")
    assert "empty name" in fail("export", for_gguf, "")
    assert "m.gguf is a file" in fail("export", for_gguf, tmp_path / "m.gguf" / "m.gguf")
    assert "is not binarized" in fail("export", float_model, tmp_path / "n.gguf")
    assert "no model directory" in fail("export", "./nothing", tmp_path / "n.gguf")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(for_gguf), str(tmp_path / "n.gguf"), "--to", "onnx"])
    assert stop.value.code == 2
