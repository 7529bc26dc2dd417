"""What a model card says, whose words it keeps, and what of the base model it takes over."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import outputs, save_tiny, tiny_model, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, save_model
from optimum_arb.commands.main import main
from optimum_arb.evaluate import perplexity
from optimum_arb.hub import base_model_facts, model_card, push_directory, record_perplexity, write_card
from optimum_arb.inspection import inspect_model

CONFIG = {"block_size": 64, "num_samples": 4, "planes": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("base"), "LlamaForCausalLM", tokenizer=True)
    (path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- other\n---\n# Base\n")
    return path


@pytest.fixture(scope="module")
def model(source):
    config = ARBConfig(dataset=tokens(), base_model="them/base", overrides={"o_proj": {"planes": 1}}, **CONFIG)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


@pytest.fixture
def saved(model, tmp_path):
    return save_model(model, tiny_tokenizer(), tmp_path / "some-model")


def rows(path) -> dict[str, str]:
    lines = [line for line in (path / "README.md").read_text().splitlines() if line.startswith("| ")]
    return dict(line.strip("| ").split(" | ", 1) for line in lines[1:])


def test_what_it_says(saved):
    card = ModelCard.load(saved / "README.md")
    data = card.data.to_dict()
    assert data["tags"] == ["arb", "1-bit", "quantized"]
    assert data["base_model"] == "them/base"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert data["pipeline_tag"] == "text-generation"
    assert "model-index" not in data
    lines = [line for line in card.text.splitlines() if line]
    assert "`pip install optimum-arb`" in lines[0]
    assert lines[1] == "# some-model"
    found, inspection = rows(saved), inspect_model(saved)
    assert found["base model"] == "[them/base](https://huggingface.co/them/base)"
    assert found["method"] == "`arb-hrc`, 2 sign planes, blocks of 64 columns, other choices for `o_proj`"
    assert found["true bits per weight"].startswith(
        f"{inspection.bits_per_weight:.4f}, over {inspection.weights:,} binarized weights"
    )
    assert found["whole model"].startswith(f"{inspection.file_bytes / 1000:,.1f} kB, of which ")
    assert found["calibrated on"] == "custom: 4 sequences of 24 tokens"
    assert found["perplexity"] == "not measured"
    assert found["licence"] == "apache-2.0, the base model's"
    # nothing of the machine that made it
    assert "/" not in found["calibrated on"]
    assert str(saved.parent) not in card.content


@pytest.mark.parametrize("text", ["My own card.\n", "---\nlicense: mit\n---\nMine\n", ""])
def test_the_users_card_is_kept(model, saved, text):
    (saved / "README.md").write_text(text)
    assert write_card(saved) is False
    model.save_pretrained(saved)
    save_model(model, None, saved, overwrite=True)
    assert (saved / "README.md").read_text() == text


def test_a_changed_card_is_kept_and_an_unchanged_one_replaced(saved):
    original = (saved / "README.md").read_text()
    assert write_card(saved, name="me/renamed") is True
    renamed = (saved / "README.md").read_text()
    assert "# renamed" in renamed
    (saved / "README.md").write_bytes(renamed.replace("\n", "\r\n").encode())
    assert write_card(saved) is True
    assert (saved / "README.md").read_text() == original
    (saved / "README.md").write_text(original.replace("# some-model", "# My model"))
    assert write_card(saved) is False


def test_a_measured_perplexity(saved, source):
    options = ["--text", str(saved.parent / "text.txt"), "--context-length", "16", "--record", "--json"]
    (saved.parent / "text.txt").write_text(" ".join(f"w{5 + i % 80}" for i in range(100)))
    before = (saved / "config.json").stat().st_mode
    assert main(["evaluate", str(saved), *options]) == 0
    recorded = json.loads((saved / "config.json").read_text())["quantization_config"]["perplexity"]
    assert {**recorded, "perplexity": 0} == {
        "perplexity": 0, "text": "text.txt", "context_length": 16, "windows": 6, "tokens": 90
    }  # fmt: skip
    assert (saved / "config.json").stat().st_mode == before
    shown = f"{recorded['perplexity']:,.2f} on text.txt: 6 windows of 16 tokens without overlap, 90 tokens predicted"
    assert rows(saved)["perplexity"] == shown
    result = ModelCard.load(saved / "README.md").data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("perplexity", recorded["perplexity"])
    # it stays with the model
    again = AutoModelForCausalLM.from_pretrained(saved)
    again.save_pretrained(saved.parent / "again")
    assert rows(saved.parent / "again")["perplexity"] == shown
    assert main(["evaluate", str(source), *options]) == 2


@pytest.mark.parametrize(
    ("record", "key"), [({"perplexity": 9.5}, "text"), ({"perplexity": "9", "text": "t"}, "perplex")]
)
def test_a_perplexity_that_is_no_record(saved, record, key):
    path = saved / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["perplexity"] = record
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json records a perplexity whose {key}.* --record"):
        model_card(saved)


def test_perplexity_of_a_model_in_memory(saved):
    again = AutoModelForCausalLM.from_pretrained(saved)
    result = perplexity(again, tokens(4, 16).flatten(), context_length=16)
    record_perplexity(again, result)
    again.save_pretrained(saved)
    assert rows(saved)["perplexity"].startswith(f"{result.perplexity:,.2f} on token ids: 4 windows")
    before = (saved / "config.json").read_bytes()
    for target in (again, saved):
        with pytest.raises(ValueError, match="A perplexity of inf cannot be recorded: the model is broken"):
            record_perplexity(target, replace(result, perplexity=math.inf))
    assert (saved / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="is not binarized"):
        record_perplexity(tiny_model("LlamaForCausalLM"), result)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_a_variant(model, tmp_path, options, caplog):
    """Its files are called after it, and it is loaded by its name."""
    path = tmp_path / "model"
    model.save_pretrained(path, variant="arb", **options)
    assert not caplog.text
    assert "from_pretrained('model', variant='arb', device_map" in (path / "README.md").read_text()
    again = type(model).from_pretrained(path, variant="arb")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert inspect_model(path).file_bytes == size
    model.save_pretrained(path, variant="other")
    with pytest.raises(ValueError, match=r"holds 2 variants of a model \(arb, other\) and none without a name"):
        inspect_model(path)
    model.save_pretrained(path)
    assert "variant=" not in (path / "README.md").read_text()
    assert inspect_model(path).file_bytes == (path / "model.safetensors").stat().st_size


def test_base_models(source, tmp_path):
    assert base_model_facts("me/base", "abc") == {"name": "me/base", "revision": "abc"}
    assert base_model_facts("me/base", "abc", {"name": "other/base"}) == {"name": "other/base"}
    assert base_model_facts(str(source)) == {"license": "apache-2.0", "language": ["en"]}
    assert base_model_facts(str(tmp_path)) is None
    assert base_model_facts(None) is None
    assert base_model_facts("/no/such/directory") is None
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert base_model_facts(str(tmp_path)) is None


def test_other_models_are_saved_as_before(source, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(source)
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
    for attempt in (model_card, write_card, lambda path: push_directory(path, "me/model")):
        with pytest.raises((ValueError, OSError), match=r"holds no model that was binarized|HF_HUB_OFFLINE"):
            attempt(tmp_path / "plain")


def test_models_can_still_be_copied_and_pickled(model):
    ids = tokens(1, 8)
    expected = outputs(model, ids)
    assert torch.equal(outputs(copy.deepcopy(model), ids), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), ids), expected)


def test_a_card_that_cannot_be_written_does_not_lose_the_model(model, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("no card")

    monkeypatch.setattr("optimum_arb.hub.methods.write_card", fail)
    model.save_pretrained(tmp_path / "model")
    assert "but its card could not be written: no card" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))


@pytest.mark.parametrize(
    "choices", [{"scale_bits": 8}, {"method": "arb-dbf", "factor_bits": 2.0, "scale_bits": 8}, {"hadamard": 64}]
)
def test_bytes_and_weights_are_those_of_the_file(source, tmp_path, choices):
    config = ARBConfig(dataset=tokens(), block_size=64, num_samples=4, **choices)
    saved = save_model(AutoModelForCausalLM.from_pretrained(source, quantization_config=config), None, tmp_path / "it")
    inspection = inspect_model(saved)
    packed = sum(module.stored_bytes for module in inspection.modules)
    found = rows(saved)
    assert found["true bits per weight"] == (
        f"{inspection.bits_per_weight:.4f}, over {inspection.weights:,} binarized weights ({packed / 1000:.1f} kB)"
    )
    assert found["whole model"].endswith(f"{(inspection.stored_bytes - packed) / 1000:.1f} kB are tensors in float")


def test_a_card_on_a_full_disk_is_the_old_one(saved, monkeypatch):
    before = (saved / "README.md").read_text()

    def cut_short(path, text, **kwargs):
        with open(path, "w") as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match=r"No space left on device: .*README\.md"):
        write_card(saved, tags=["other"])
    monkeypatch.undo()
    assert (saved / "README.md").read_text() == before
    assert not list(saved.glob(".*"))
    assert write_card(saved, tags=["other"])


def test_a_perplexity_on_a_full_disk_names_the_file(saved, monkeypatch):
    before = (saved / "config.json").read_text()
    result = perplexity(tiny_model("LlamaForCausalLM"), tokens(), context_length=16)

    def full(descriptor, *args, **kwargs):
        os.close(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json"):
        record_perplexity(saved, result)
    monkeypatch.undo()
    assert (saved / "config.json").read_text() == before
    assert not list(saved.glob(".config-*"))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"method": "arb-dbf", "factor_bits": 2.0}, "`arb-dbf`, products of two sign matrices, 2 bits a weight"),
        ({"hadamard": 64, "scale_bits": 8, "planes": 2},
         "`arb-hrc`, 2 sign planes, blocks of 128 columns, Hadamard transform of 64 columns where it pays, "
         "8-bit scales"),
        ({"target_bits_per_weight": 2.5, "overrides": {"a": {"planes": 2}, "b": {"planes": 3}}},
         "`arb-hrc`, at most 2.5 bits a weight, divided among the modules, blocks of 128 columns, other choices for "
         "`a`, `b`"),
        ({"target_bits_per_weight": 2, "overrides": {f"l.{i}": {"method": "arb-dbf", "rank": 8} for i in range(9)}},
         "`arb-hrc` and `arb-dbf`, at most 2 bits a weight, divided among the modules, blocks of 128 columns, choices "
         "of their own for 9 modules or patterns, see `config.json`"),
        ({"method": "arb-dbf", "target_bits_per_weight": 2, "overrides": {"a": {"rank": 8}}},
         "`arb-dbf`, at most 2 bits a weight, divided among the modules, products of two sign matrices, other choices "
         "for `a`"),
    ],
)  # fmt: skip
def test_the_method_in_words(saved, choices, expected):
    path = saved / "config.json"
    content = json.loads(path.read_text())
    kept = {key: content["quantization_config"][key] for key in ("quant_method", "calibration", "bits_per_weight")}
    content["quantization_config"] = {**ARBConfig(**choices).to_dict(), **kept}
    path.write_text(json.dumps(content))
    write_card(saved)
    assert rows(saved)["method"] == expected
