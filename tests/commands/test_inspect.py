"""`inspect`: true bits from the headers alone, equal to the bytes of the file."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, inspection, quantize_checkpoint
from optimum_arb.inspection import inspect_model
from optimum_arb.report import model_report
from optimum_arb.stored import tensors as stored_tensors


def test_agrees_with_the_bytes_of_the_file_and_with_the_loaded_model(call, binarized_model):
    result = call("inspect", binarized_model, "--json")
    path = binarized_model / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert result["file_bytes"] == path.stat().st_size
    assert result["stored_bytes"] == path.stat().st_size - header
    tensors = load_file(path)
    for module in result["modules"]:
        own = {k: t for k, t in tensors.items() if k.startswith(f"{module['name']}.weight")}
        assert module["stored_bytes"] == sum(t.numel() * t.element_size() for t in own.values())
    packed = sum(module["stored_bytes"] for module in result["modules"])
    assert result["bits_per_weight"] == 8 * packed / result["weights"]
    assert packed + sum(result["float_tensors"].values()) == result["stored_bytes"]
    report = model_report(AutoModelForCausalLM.from_pretrained(binarized_model))
    assert result["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert result["config"]["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert [m["name"] for m in result["modules"]] == [m.name for m in report.modules]
    assert [m["layout"] for m in result["modules"]] == [m.layout for m in report.modules]


def test_readable_output(call, binarized_model):
    out = call("inspect", binarized_model)
    for text in (
        "true bits per weight",
        "model.layers.*.mlp.down_proj",
        "planes-2-col",
        "model.layers.*.mlp.up_proj.weight",
        "bias of a binarized linear",
        "fingerprint",
    ):
        assert text in out
    assert "model.layers.0.mlp.down_proj" not in out
    assert "model.layers.0.mlp.down_proj" in call("inspect", binarized_model, "--modules")


def test_sharded(call, float_model, tmp_path):
    out = tmp_path / "sharded"
    options = ("--method", "rtn", "--no-calibration", "--max-shard-size", "20KB")
    call("quantize", float_model, out, *options)
    files = list(out.glob("*.safetensors"))
    assert len(files) > 1
    result = call("inspect", out, "--json")
    assert result["file_bytes"] == sum(file.stat().st_size for file in files)
    assert len(result["modules"]) == 14


def test_model_on_the_hub(call, binarized_model, monkeypatch):
    """The client of the Hub gives the same headers, of which the same numbers are made."""
    with safe_open(binarized_model / "model.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        infos, end = {}, 0
        for key, part in slices.items():
            begin, end = end, end + file.get_tensor(key).nbytes
            infos[key] = SimpleNamespace(dtype=part.get_dtype(), shape=part.get_shape(), data_offsets=(begin, end))
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=infos)})
    local = inspect_model(binarized_model)
    config = inspection.AutoConfig.from_pretrained(binarized_model)
    monkeypatch.setattr(stored_tensors, "get_safetensors_metadata", lambda name: metadata)
    monkeypatch.setattr(inspection.AutoConfig, "from_pretrained", lambda name: config)
    remote = inspect_model("somebody/model")
    assert remote.modules == local.modules
    assert remote.stored_bytes == local.stored_bytes == remote.file_bytes


@pytest.fixture
def damaged(binarized_model, tmp_path):
    return shutil.copytree(binarized_model, tmp_path / "damaged")


def test_not_binarized(fail, float_model, tmp_path):
    assert "is not binarized" in fail("inspect", float_model)
    assert "There is no model directory" in fail("inspect", tmp_path / "missing")


def test_missing_tensor(fail, damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_row_scale"]
    save_file(tensors, damaged / "model.safetensors")
    assert "'model.layers.0.mlp.up_proj.weight_row_scale' is missing" in fail("inspect", damaged)


def test_missing_module(fail, damaged):
    tensors = load_file(damaged / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "layers.0.mlp.up_proj" not in k}, damaged / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in fail("inspect", damaged)


def test_cut_file(fail, damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "no intact safetensors file" in fail("inspect", damaged)
    path.unlink()
    assert "does not exist" in fail("inspect", damaged)


def test_newer_format(fail, damaged):
    path = damaged / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))
    assert "format version 99" in fail("inspect", damaged)


def test_errors_of_the_layers(call, fail, binarized_model, damaged, tmp_path):
    report = json.loads((binarized_model / "arb_report.json").read_text())
    result = call("inspect", binarized_model, "--json")
    assert [m["output_error"] for m in result["report"]] == [m["output_error"] for m in report["modules"]]
    out = call("inspect", binarized_model, "--modules")
    line = next(line for line in out.splitlines() if line.startswith("model.layers.0.mlp.down_proj "))
    entry = next(m for m in report["modules"] if m["name"] == "model.layers.0.mlp.down_proj")
    assert line.split()[-2:] == [f"{entry['weight_error']:.4f}", f"{entry['output_error']:.4f}"]
    (damaged / "arb_report.json").unlink()
    assert call("inspect", damaged, "--json")["report"] is None
    assert "needs arb_report.json" in fail("inspect", damaged, "--plot", tmp_path / "plot.svg")


def test_broken_layers_are_told(call, damaged):
    path = damaged / "arb_report.json"
    report = json.loads(path.read_text())
    report["modules"][3]["output_error"] = 1.5
    path.write_text(json.dumps(report))
    out = call("inspect", damaged)
    assert f"LOOKS BROKEN  {report['modules'][3]['name']}: it loses 1.50 of its output" in out
    (warning,) = (w for w in call("inspect", damaged, "--json")["warnings"] if w["rule"] == "lost")
    assert warning["module"] == report["modules"][3]["name"]


def test_plot(call, fail, binarized_model, tmp_path):
    pytest.importorskip("matplotlib")
    call("inspect", binarized_model, "--plot", tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    # a line for each kind of linear, a marker for each layer
    assert drawn.count("<use ") > 13
    call("inspect", binarized_model, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    call("inspect", binarized_model, "--plot", tmp_path / "pictures" / "plot.svg")
    assert (tmp_path / "pictures" / "plot.svg").is_file()
    assert "empty name" in fail("inspect", binarized_model, "--plot", "")
    below = tmp_path / "plot.svg" / "plot.svg"
    assert "plot.svg is a file" in fail("inspect", binarized_model, "--plot", below)
    assert "the picture is written as" in fail("inspect", binarized_model, "--plot", tmp_path / "plot.gif")


def test_what_a_hadamard_transform_gains_stands_beside_each_layer(call, float_model, tmp_path):
    config = ARBConfig(dataset=torch.randint(5, 96, (2, 16)), hadamard=64, admm_iterations=2)
    quantize_checkpoint(float_model, tmp_path / "out", config)
    reported = {module.name: module.hadamard_gain for module in inspect_model(str(tmp_path / "out")).report}
    lines = call("inspect", tmp_path / "out", "--modules").splitlines()
    assert any(line.startswith("binarized") and line.rstrip().endswith("Hadamard gain") for line in lines)
    for name, gain in reported.items():
        assert next(line for line in lines if line.startswith(f"{name} ")).split()[-1] == f"{gain:.4f}"
