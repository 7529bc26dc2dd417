"""`quantize`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.commands.quantize import add_arguments, build_config, parse_overrides
from optimum_arb.config import RECORDED

QUICK = ("--num-samples", "2", "--sequence-length", "32")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def parse(*options: str):
    return _parser().parse_args(["model", "out", *options])


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


# What `ARBConfig` takes and `quantize` has no option of that name for, and why.
WITHOUT_OPTION = {
    "overrides": "--override, once for each pattern",
    "backend": "chosen for each load of a binarized model",
    "max_memory": "places a model that is calibrated on load; `quantize` holds one layer at a time",
    "verify_checksums": "chosen for each load of a binarized model",
    "format_version": "recorded by the run",
    "requires": "recorded by the run",
    **dict.fromkeys(set(RECORDED) - {"base_model"}, "recorded by the run"),
}
FIELDS = set(inspect.signature(ARBConfig).parameters) - {"kwargs"}


def test_every_option_reaches_the_configuration():
    given = {
        "method": "arb-rc",
        "block_size": 64,
        "group_bitmap": "none",
        "salient_columns": 5,
        "num_iterations": 3,
        "compensation": "diagonal",
        "split_metric": "score",
        "dataset": "some.txt",
        "num_samples": 7,
        "held_out_samples": 2,
        "sequence_length": 9,
        "batch_size": 2,
        "seed": 4,
        "damp_percent": 0.02,
    }
    options = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
    config = build_config(parse(*options, "--modules-to-not-convert", "q_proj", "re:.*k_proj"))
    assert {name: getattr(config, name) for name in given} == given
    assert config.modules_to_not_convert == ["q_proj", "re:.*k_proj"]
    assert build_config(parse("--base-model", "me/base")).base_model == {"name": "me/base"}
    config = build_config(parse("--no-col-scale", "--no-act-order"))
    assert (config.col_scale, config.act_order) == (False, False)
    others = {"planes", "refinement_sweeps", "modules_to_not_convert", "base_model", "col_scale", "act_order", "rank"}
    others |= {"factor_bits", "scale_bits", "hadamard", "admm_iterations", "shrinkage", "other_modalities"}
    others |= {"error_correction", "target_bits_per_weight"}
    others |= {"refine", "refine_steps", "refine_learning_rate", "refine_signs"}
    assert set(given) | others == FIELDS - set(WITHOUT_OPTION)
    assert build_config(parse("--planes", "3")).planes == 3
    assert build_config(parse("--method", "arb-dbf", "--rank", "7")).rank == 7
    assert build_config(parse("--method", "arb-dbf", "--factor-bits", "0.8")).factor_bits == 0.8
    assert build_config(parse("--scale-bits", "8")).scale_bits == 8
    assert build_config(parse("--hadamard", "128")).hadamard == 128
    assert build_config(parse("--admm-iterations", "0")).admm_iterations == 0
    assert build_config(parse("--shrinkage", "0")).shrinkage == 0
    assert build_config(parse("--error-correction", "0.25")).error_correction == 0.25
    assert build_config(parse("--method", "auto", "--target-bits-per-weight", "1.5")).target_bits_per_weight == 1.5
    assert build_config(parse("--other-modalities")).other_modalities is True
    assert build_config(parse()).other_modalities is False
    assert build_config(parse("--refinement-sweeps", "2")).refinement_sweeps == 2
    assert build_config(parse("--method", "arb", "--salient-columns", "search")).salient_columns == "search"
    assert build_config(parse("--no-calibration")).dataset is None


def test_every_field_has_an_option_or_a_reason():
    options = {action.dest: action.option_strings for action in _parser()._actions}
    assert FIELDS - set(options) == set(WITHOUT_OPTION)
    for name in FIELDS & set(options):
        assert "--" + name.replace("_", "-") in options[name]
    assert "--override" in options["override"]


def test_overrides():
    assert parse_overrides(["down_proj=planes:2,block_size:64", "down_proj=act_order:false", "re:.*(?=x).*=skip"]) == {
        "down_proj": {"planes": 2, "block_size": 64, "act_order": False},
        "re:.*(?=x).*": {"skip": True},
    }
    for text in ("down_proj", "=planes:2", "down_proj=planes"):
        with pytest.raises(ValueError, match="must be PATTERN=KEY:VALUE"):
            parse_overrides([text])


def test_output_that_holds_a_model_is_refused_before_the_work(fail, binarized_model, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in binarized_model.iterdir()}
    # The model to binarize does not exist: the output directory is looked at first.
    assert "already holds a model" in fail("quantize", tmp_path / "missing", binarized_model)
    assert {path.name: path.stat().st_mtime_ns for path in binarized_model.iterdir()} == before


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
        (("--planes", "4"), "planes='?4'?"),
        (("--override", "nothing_like_it=planes:2"), "'nothing_like_it' matches none"),
        (("--override", "down_proj=colour:2"), "unknown key 'colour'"),
        (("--modules-to-not-convert", "re:("), "no regular expression"),
        (("--dataset", "no-such-text"), "no-such-text"),
        (("--num-samples", "1", "--sequence-length", "0"), "sequence_length=0"),
        (("--no-calibration", "--num-samples", "4"), "--num-samples does nothing with --no-calibration"),
    ],
)
def test_bad_options_write_nothing(fail, float_model, tmp_path, options, message):
    assert re.search(message, fail("quantize", float_model, tmp_path / "out", *options))
    assert list(tmp_path.iterdir()) == []


def test_missing_model(fail, tmp_path):
    assert "There is no model directory" in fail("quantize", tmp_path / "missing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fail("quantize", tmp_path / "empty", tmp_path / "out")


def test_quantized_model_is_not_binarized(fail, binarized_model, float_model, tmp_path):
    assert "already binarized" in fail("quantize", binarized_model, tmp_path / "out")
    foreign = shutil.copytree(float_model, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (foreign / "config.json").write_text(json.dumps(config))
    assert "already quantized with gptq" in fail("quantize", foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()
