from __future__ import annotations

import pytest
import torch
from tiny_models import outputs, save_tiny, tiny_model, tiny_tokenizer, tokens
from transformers import AutoTokenizer, LlamaForCausalLM

from optimum_arb import ARBConfig, check_output_directory, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")
    return LlamaForCausalLM.from_pretrained(source, quantization_config=ARBConfig(dataset=None, block_size=64))


@pytest.mark.parametrize("exists", [False, True])
def test_model_and_tokenizer(model, tmp_path, exists):
    path = tmp_path / "some" / "model"
    if exists:
        path.mkdir(parents=True)
    assert save_model(model, tiny_tokenizer(), path) == path
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(path), tokens(1, 8)), outputs(model, tokens(1, 8)))
    assert AutoTokenizer.from_pretrained(path)("w7 w9")["input_ids"] == [7, 9]
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    assert path.stat().st_mode & 0o055 == 0o755 & 0o055 & path.parent.stat().st_mode


def test_overwriting_replaces_the_model_and_keeps_other_files(model, tmp_path):
    tiny_model("LlamaForCausalLM", seed=3).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    (tmp_path / "model" / "notes.md").write_text("mine")
    save_model(model, None, tmp_path / "model", overwrite=True)
    names = {file.name for file in (tmp_path / "model").iterdir()}
    own = {"README.md", "arb_report.json", "config.json", "generation_config.json", "model.safetensors"}
    assert names == {*own, "notes.md"}
    assert (tmp_path / "model" / "notes.md").read_text() == "mine"
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_float_model_leaves_no_report_of_another_behind(model, tmp_path):
    save_model(model, None, tmp_path / "model")
    save_model(tiny_model("LlamaForCausalLM"), None, tmp_path / "model", overwrite=True)
    assert not (tmp_path / "model" / "arb_report.json").exists()


def test_overwriting_the_directory_that_the_model_was_loaded_from(model, tmp_path):
    save_model(model, None, tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    save_model(loaded, None, tmp_path / "model", overwrite=True)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))


def test_checking_leaves_no_trace(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    assert check_output_directory(tmp_path) == tmp_path
    assert check_output_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.md"]
