"""`requantize`: the same run again gives the same bits; another base, what changed; what is missing is asked for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from optimum_arb import inspection
from optimum_arb.evaluate import PerplexityResult
from optimum_arb.hub import record_perplexity

OPTIONS = ("--num-samples", 3, "--held-out-samples", 1, "--sequence-length", 32, "--block-size", 64)


@pytest.fixture(scope="module")
def earlier(float_model, tmp_path_factory):
    """A run with choices that are no defaults, of which everything is recorded."""
    from optimum_arb.commands.main import main

    out = tmp_path_factory.mktemp("earlier") / "model"
    more = ("--override", "down_proj=planes:2", "--modules-to-not-convert", "layers.1.mlp.up_proj", "--seed", 5)
    assert main([str(a) for a in ("quantize", float_model, out, *OPTIONS, *more, "--base-model", "me/base")]) == 0
    return out


def test_the_same_base_gives_the_same_bits(call, earlier, float_model, tmp_path):
    result = call("requantize", earlier, tmp_path / "again", "--base", float_model, "--json")
    before, after = (load_file(path / "model.safetensors") for path in (earlier, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key in ("bits_per_weight", "packed_bytes", "weight_error", "output_error", "held_out_error", "calibration",
                "base_fingerprint", "optimum_arb"):  # fmt: skip
        assert result[key]["before"] == result[key]["after"] is not None, key
    old, new = (json.loads((path / "config.json").read_text()) for path in (earlier, tmp_path / "again"))
    assert old["quantization_config"] == new["quantization_config"]
    assert len(result["modules"]) == 13


def test_the_base_is_not_replaced(fail, earlier, float_model, tmp_path):
    base = shutil.copytree(float_model, tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    assert "holds the float model itself" in fail("requantize", earlier, base, "--base", base, "--overwrite")
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("family", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_the_class_is_that_of_the_base(call, family, tmp_path):
    save_tiny(tmp_path / "base", family, tokenizer=True)
    call("quantize", tmp_path / "base", tmp_path / "first", "--no-calibration")
    call("requantize", tmp_path / "first", tmp_path / "again", "--base", tmp_path / "base")
    first, again = (tmp_path / name for name in ("first", "again"))
    assert json.loads((again / "config.json").read_text())["architectures"] == [family]
    before, after = (load_file(path / "model.safetensors") for path in (first, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_base_shows_what_changed(call, earlier, float_model, tmp_path):
    base = shutil.copytree(float_model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = torch.randn_like(tensors[f"{name}.weight"]) ** 3  # harder to binarize
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = call("requantize", earlier, tmp_path / "new", "--base", base, "--json")
    assert result["base_fingerprint"]["before"] != result["base_fingerprint"]["after"]
    errors = [module["output_error"] for module in result["modules"].values()]
    rises = [pair["after"] - pair["before"] for pair in errors]
    assert rises == sorted(rises, reverse=True)
    assert rises[0] > 0
    assert result["modules"][name]["output_error"]["before"] != result["modules"][name]["output_error"]["after"]
    out = call("requantize", earlier, tmp_path / "new", "--base", base, "--overwrite")
    assert "another" in out
    assert next(iter(result["modules"])) in out


def test_recorded_perplexity_is_measured_again(call, fail, earlier, float_model, tmp_path):
    model = shutil.copytree(earlier, tmp_path / "earlier")
    record_perplexity(model, PerplexityResult(99.0, 4.6, 62, 32, 2, "wikitext-2-test", 1.0))
    options = ("--base", float_model)
    result = call("requantize", model, tmp_path / "a", *options, "--json")
    measured = call("evaluate", tmp_path / "a", "--context-length", 32, "--max-windows", 2, "--json")["perplexity"]
    assert result["perplexity"]["before"] == 99.0
    assert result["perplexity"]["after"] == pytest.approx(measured, rel=1e-5)
    stored = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["perplexity"]
    assert stored["perplexity"] == pytest.approx(measured, rel=1e-5)
    record_perplexity(model, PerplexityResult(99.0, 4.6, 62, 32, 2, "mine.txt", 1.0))
    assert "measured on 'mine.txt', which is not recorded: give the text with --text" in fail(
        "requantize", model, tmp_path / "b", *options
    )
    result = call("requantize", model, tmp_path / "b", *options, "--no-perplexity", "--json")
    assert result["perplexity"] == {"before": 99.0, "after": None}


def test_what_is_not_recorded_is_asked_for(call, fail, earlier, float_model, binarized_model, tmp_path):
    out = tmp_path / "out"
    assert "does not record what it was made from" in fail("requantize", binarized_model, out)
    assert "leave it out" in fail("requantize", earlier, out, "--base", float_model, "--revision", "v2")
    assert "is quantized already" in fail("requantize", earlier, out, "--base", binarized_model)
    assert "empty name" in fail("requantize", earlier, out, "--base", "")
    text = tmp_path / "mine.txt"
    text.write_text("the lobster is a species of lobster " * 100)
    own = tmp_path / "own"
    call("quantize", float_model, own, *OPTIONS, "--dataset", text)
    message = fail("requantize", own, out, "--base", float_model)
    assert "was calibrated on the file 'mine.txt'" in message
    assert "give the text with --dataset" in message
    result = call("requantize", own, out, "--base", float_model, "--dataset", text, "--json")
    assert result["calibration"]["before"] == result["calibration"]["after"]
    assert not (tmp_path / "none").exists()
    free = tmp_path / "free"
    call("quantize", float_model, free, "--method", "rtn", "--no-calibration")
    assert "does not repeat that run" in fail(
        "requantize", free, tmp_path / "none", "--base", float_model, "--dataset", text
    )
    assert call("requantize", free, tmp_path / "none", "--base", float_model, "--json")["calibration"] == {
        "before": None,
        "after": None,
    }


def test_revision_goes_to_the_hub(earlier, monkeypatch):
    """The recorded name is loaded at the revision asked for."""
    from optimum_arb.requantize import plan_again

    plan = plan_again(earlier, revision="v2")
    assert (plan.base, plan.revision, plan.config.base_model) == ("me/base", "v2", {"name": "me/base"})
    assert plan.config.overrides == {"down_proj": {"planes": 2}}
    assert (plan.config.seed, plan.config.held_out_samples, plan.config.block_size) == (5, 1, 64)
    assert plan.config.dataset == "wikitext-2"
    assert isinstance(plan.earlier, inspection.Inspection)


def test_without_a_report_the_errors_before_are_unknown(call, earlier, float_model, tmp_path):
    model = shutil.copytree(earlier, tmp_path / "earlier")
    (model / "arb_report.json").unlink()
    out = call("requantize", model, tmp_path / "new", "--base", float_model)
    assert "has no arb_report.json" in out
