"""`arb_report.json`: written with the model, read again by loading and by `inspect`, ignored where it does not fit."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from tiny_experts import save_moe
from tiny_models import save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, model_report, save_model
from optimum_arb.commands.main import main
from optimum_arb.inspection import inspect_model
from optimum_arb.stored.report import NAME, read_report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A calibrated model with two of six sequences held out, its report, and the directory where both were saved."""
    path = tmp_path_factory.mktemp("models")
    save_tiny(path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(6), num_samples=6, held_out_samples=2, block_size=64, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=config)
    save_model(model, None, path / "packed")
    return model_report(model), path / "packed"


def test_the_file_holds_the_report_of_the_run(saved):
    report, path = saved
    content = json.loads((path / NAME).read_text())
    assert [m["name"] for m in content["modules"]] == [m.name for m in report.modules]
    for entry, module in zip(content["modules"], report.modules, strict=True):
        assert entry["held_out_error"] == module.held_out_error > 0
        assert (entry["tokens"], entry["held_out_tokens"]) == (4 * 24, 2 * 24)
        assert (entry["planes"], entry["block_size"], entry["bits_per_weight"]) == (1, 64, module.bits_per_weight)
    assert content["calibration"]["held_out_samples"] == 2
    assert content["reproduce"]["versions"]["torch"] == torch.__version__
    assert content["reproduce"]["models"]["base"]["name"] == "float"
    assert content["reproduce"]["models"]["base"]["fingerprint"].startswith("sha256:")
    assert str(path.parent) not in json.dumps(content)  # no path of this machine
    # 96 calibration tokens are too few for layers of 96 columns
    assert {"overfit"} <= {warning["rule"] for warning in content["warnings"]} <= {"overfit", "lost"}


def test_held_out_sequences_change_nothing_but_what_is_fitted(saved, tmp_path):
    """The same weights as from the other sequences alone; and the errors are those on the sequences held out."""
    report, path = saved
    source = path.parent / "float"
    config = ARBConfig(dataset=tokens(6)[:4], num_samples=4, block_size=64, batch_size=2)
    alone = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    packed = AutoModelForCausalLM.from_pretrained(path)
    for (name, ours), (_, theirs) in zip(packed.state_dict().items(), alone.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    # of the very first linears, whose inputs nothing binarized has touched, the error can be computed from outside
    dense = AutoModelForCausalLM.from_pretrained(source)
    seen = []
    handle = dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        dense(tokens(6)[4:])
    handle.remove()
    weight = dense.model.layers[0].self_attn.q_proj.weight.detach()
    x = seen[0].flatten(0, 1)
    lost = x @ (weight - packed.model.layers[0].self_attn.q_proj.dequantize()).T
    expected = float(lost.square().sum() / (x @ weight.T).square().sum())
    found = {m.name: m for m in report.modules}["model.layers.0.self_attn.q_proj"]
    assert found.held_out_error == pytest.approx(expected, rel=1e-3)
    assert found.output_error != found.held_out_error


def test_loading_and_saving_again_keeps_it(saved, tmp_path):
    report, path = saved
    again = AutoModelForCausalLM.from_pretrained(path)
    assert [(m.name, m.output_error, m.held_out_error) for m in model_report(again).modules] == [
        (m.name, m.output_error, m.held_out_error) for m in report.modules
    ]
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / NAME).read_text()) == json.loads((path / NAME).read_text())


def test_inspection_reads_it(saved):
    report, path = saved
    found = inspect_model(path)
    assert found.report == list(report.modules)
    assert found.to_dict()["report"][0]["held_out_error"] == report.modules[0].held_out_error
    assert found.reproduce["versions"]["optimum_arb"]


def test_a_report_of_another_model_does_not_count(saved, tmp_path, caplog):
    _, path = saved
    other = shutil.copytree(path, tmp_path / "other")
    content = json.loads((other / NAME).read_text())
    content["modules"][0]["stored_bytes"] += 1
    (other / NAME).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert inspect_model(other).report is None
    assert "of another model" in caplog.text


def test_an_entry_with_a_text_in_place_of_a_number_is_damage(saved, tmp_path, capsys):
    other = shutil.copytree(saved[1], tmp_path / "other")
    content = json.loads((other / NAME).read_text())
    content["modules"][0]["hadamard_gain"] = "much"
    (other / NAME).write_text(json.dumps(content))
    assert read_report(other) is None
    assert main(["inspect", str(other)]) == 0
    assert "Hadamard gain" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"schema": 1}', '{"schema": 1, "modules": [{"name": 3}], "reproduce": null}']
)
def test_a_damaged_report_is_told_and_the_model_loads(saved, tmp_path, caplog, damage):
    _, path = saved
    other = shutil.copytree(path, tmp_path / "other")
    (other / NAME).write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert read_report(other) is None
        model = AutoModelForCausalLM.from_pretrained(other)
    assert "the errors of the layers are not known" in caplog.text
    assert all(module.weight_error is None for module in model_report(model).modules)
    # saving it writes no report of unknown errors, and leaves none of another model
    (tmp_path / "saved").mkdir()
    shutil.copy(path / NAME, tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / NAME).exists()


def test_experts(tmp_path):
    """Held-out errors of experts are of the inputs that are routed to them."""
    source = save_moe(tmp_path / "float", "MixtralForCausalLM")
    config = ARBConfig(dataset=tokens(8), num_samples=8, held_out_samples=4, block_size=64, batch_size=4)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    experts = [module for module in model_report(model).modules if module.experts]
    assert experts
    for module in experts:
        assert module.held_out_tokens == 4 * 24 * model.config.num_experts_per_tok
        assert 0 < module.held_out_error < 1


def test_bad_choices(saved):
    _, path = saved
    with pytest.raises(ValueError, match="held_out_samples=4 must be a whole number from 0 to 3"):
        ARBConfig(num_samples=4, held_out_samples=4)
    with pytest.raises(ValueError, match="held_out_samples=2 needs a dataset"):
        ARBConfig(dataset=None, held_out_samples=2)
    config = ARBConfig(dataset=tokens(2), num_samples=8, held_out_samples=2, block_size=64)
    with pytest.raises(ValueError, match="leaves nothing to calibrate on"):
        AutoModelForCausalLM.from_pretrained(path.parent / "float", quantization_config=config)
