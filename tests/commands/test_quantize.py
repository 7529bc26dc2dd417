"""`quantize`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ("--num-samples", "2", "--sequence-length", "32")


def test_saves_a_model_that_loads_with_its_tokenizer(binarized_model):
    names = {path.name for path in binarized_model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    stored = json.loads((binarized_model / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "arb"
    assert stored["calibration"]["dataset"] == "wikitext-2"
    assert stored["calibration"]["samples"] == 2
    model = AutoModelForCausalLM.from_pretrained(binarized_model)
    tokenizer = AutoTokenizer.from_pretrained(binarized_model)
    inputs = tokenizer("the lobster", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
    with safe_open(binarized_model / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.layers.0.mlp.up_proj.weight_row_scale" in keys
    assert "model.layers.1.mlp.up_proj.weight_row_scale" not in keys


def test_prints_bits_sizes_errors_and_what_stayed_in_float(call, float_model, tmp_path):
    out = call("quantize", float_model, tmp_path / "out", *QUICK, "--modules-to-not-convert", "up_proj")
    for text in (
        "true bits per weight",
        "bytes of the model",
        "mean output error",
        "model.layers.*.self_attn.q_proj",
        "arb-hrc (planes-1-col)",
        "modules_to_not_convert: 'up_proj'",
        "output embedding",
    ):
        assert text in out


def test_json(call, float_model, tmp_path):
    result = call("quantize", float_model, tmp_path / "out", "--method", "rtn", "--no-calibration", "--json")
    assert result["config"]["method"] == "rtn"
    assert result["config"]["dataset"] is None
    assert len(result["modules"]) == 14
    assert result["bits_per_weight"] == pytest.approx(
        8 * sum(m["stored_bytes"] for m in result["modules"]) / sum(m["weights"] for m in result["modules"])
    )
    assert result["kept"] == {"lm_head": "output embedding"}
    assert all(0 < m["weight_error"] < 1 for m in result["modules"])


def test_output_that_holds_a_model_is_refused_before_the_work(fail, binarized_model, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in binarized_model.iterdir()}
    # The model to binarize does not exist: the output directory is looked at first.
    assert "already holds a model" in fail("quantize", tmp_path / "missing", binarized_model)
    assert {path.name: path.stat().st_mtime_ns for path in binarized_model.iterdir()} == before


def test_the_float_model_is_not_replaced(fail, float_model, tmp_path):
    source = shutil.copytree(float_model, tmp_path / "source")
    before = (source / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link"):
        for more in ([], ["--overwrite"]):
            assert "holds the float model itself" in fail("quantize", source, out, "--no-calibration", *more)
    assert (source / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_an_empty_name_is_not_the_current_directory(fail, float_model, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert "has an empty name" in fail("quantize", float_model, "", "--no-calibration", *options)
    assert list(tmp_path.iterdir()) == []


def test_overwrite(call, float_model, tmp_path):
    out = tmp_path / "out"
    options = ("--method", "rtn", "--no-calibration")
    call("quantize", float_model, out, *options)
    call("quantize", float_model, out, *options, "--block-size", "-1", "--overwrite")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["block_size"] == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "gptq"), "method='gptq' is unknown"),
        (("--block-size", "100"), "block_size=100 cannot be packed"),
        (("--push-to-hub", "", "--no-calibration"), "--push-to-hub has an empty name"),
        (("--base-model", "", "--no-calibration"), "--base-model has an empty name"),
        (("--planes", "4"), "planes='?4'?"),
        (("--override", "nothing_like_it=planes:2"), "'nothing_like_it' matches none"),
        (("--override", "down_proj=colour:2"), "unknown key 'colour'"),
        (("--modules-to-not-convert", "re:("), "no regular expression"),
        (("--dataset", "no-such-text"), "no-such-text"),
        (("--num-samples", "1", "--sequence-length", "0"), "sequence_length=0"),
        (("--max-shard-size", "nope"), "max_shard_size='nope' is no size of a file"),
        (("--max-shard-size", "0GB"), "max_shard_size='0GB' is no size of a file"),
        (("--method", "arb-dbf", "--rank", "100000"), "rank=100000 would take .* bits a weight"),
        (("--no-calibration", "--num-samples", "4"), "--num-samples does nothing with --no-calibration"),
        (("--no-calibration", "--batch-size", "4"), "--batch-size does nothing with --no-calibration"),
        (("--device-map", "gpu"), "device_map='gpu' is unknown: use cpu, cuda"),
    ],
)
def test_bad_options_write_nothing(fail, float_model, tmp_path, options, message):
    assert re.search(message, fail("quantize", float_model, tmp_path / "out", *options))
    assert list(tmp_path.iterdir()) == []


def test_missing_model(fail, tmp_path):
    assert "There is no model directory" in fail("quantize", tmp_path / "missing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fail("quantize", tmp_path / "empty", tmp_path / "out")


def test_a_finished_run_is_told_with_its_errors(call, float_model, tmp_path):
    options = ("--num-samples", 2, "--sequence-length", 32, "--json")
    one = call("quantize", float_model, tmp_path / "out", *options)
    two = call("quantize", float_model, tmp_path / "out", *options, "--resume")
    assert two["modules"] == one["modules"]


def test_quantized_model_is_not_binarized(fail, binarized_model, float_model, tmp_path):
    assert "already binarized" in fail("quantize", binarized_model, tmp_path / "out")
    foreign = shutil.copytree(float_model, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (foreign / "config.json").write_text(json.dumps(config))
    assert "already quantized with gptq" in fail("quantize", foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()
