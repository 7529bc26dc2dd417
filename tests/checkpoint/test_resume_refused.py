"""What an interrupted run is not continued with, or overrun by."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from interruptions import LAYERS, config, interrupt
from test_quantize_checkpoint import assert_same_files
from tiny_models import save_tiny, tokens

from optimum_arb import quantize_checkpoint
from optimum_arb.checkpoint import run as run_module
from optimum_arb.checkpoint.run import work_directory
from optimum_arb.checkpoint.source import CheckpointSource
from optimum_arb.checkpoint.work import WorkDirectory
from optimum_arb.loading import calibrated


def test_an_interrupted_run_is_not_overrun(tmp_path, monkeypatch, finished):
    interrupt(monkeypatch, 9, finished / "float", tmp_path / "out", config())
    with pytest.raises(FileExistsError, match=r"Go on with it by resume=True \(--resume\), or delete"):
        quantize_checkpoint(finished / "float", tmp_path / "out", config(), overwrite=True)
    assert WorkDirectory(work_directory(tmp_path / "out")).exists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": 2}, "config.planes was 1 and is 2 now"),
        ({"dataset": tokens(6, seed=1)}, "calibration.fingerprint was "),
        ({"dataset": None}, "calibration was {"),
        # with these it is binarized in memory, and what is finished is of no use
        ({"refine": "model"}, 'config.refine was not set and is "model" now'),
        ({"target_bits_per_weight": 1.5}, "config.target_bits_per_weight was not set and is 1.5 now"),
    ],
)
def test_other_choices_are_refused(tmp_path, monkeypatch, finished, change, message):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    before = (work_directory(out) / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="cannot be continued: ") as caught:
        quantize_checkpoint(finished / "float", out, config(**change), resume=True)
    assert message in str(caught.value)
    # nothing is lost by trying
    assert (work_directory(out) / "manifest.json").read_bytes() == before
    quantize_checkpoint(finished / "float", out, config(), resume=True)
    assert_same_files(out, finished / "out")


def test_another_version_machine_or_dtype_is_refused(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    for target, name, value, message in (
        (run_module, "__version__", "9.9", 'versions.optimum_arb was "'),
        (run_module.transformers, "__version__", "9.9", "versions.transformers was "),
        (run_module.torch, "get_num_threads", lambda: 77, "machine.threads was "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(ValueError, match="cannot be continued") as caught:
                quantize_checkpoint(finished / "float", out, config(), resume=True)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match='dtype was "auto" and is "bfloat16" now'):
        quantize_checkpoint(finished / "float", out, config(), resume=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0"),
        ("model.embed_tokens.weight", "the embeddings or the head"),
    ],
)
def test_another_input_is_refused(tmp_path, monkeypatch, tensor, part):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    interrupt(monkeypatch, 9, tmp_path / "float", tmp_path / "out", config())
    stored = load_file(tmp_path / "float" / "model.safetensors")
    stored[tensor][1, 2] += 1
    save_file(stored, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"the float weights of {part} are not those that it began with"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(), resume=True)


def test_a_source_that_changes_before_its_layer_is_loaded(tmp_path, monkeypatch):
    """Its checksum is read ahead, and has to be that of what is loaded."""
    from safetensors.torch import load_file, save_file

    path = save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=LAYERS) / "model.safetensors"
    before, ahead = path.read_bytes(), threading.Event()
    fingerprint, fit = CheckpointSource.fingerprint, calibrated.binarize_linear

    def fingerprints(self, part, *args):
        found = fingerprint(self, part, *args)
        if part == "model.layers.1":
            ahead.set()
        return found

    def fits(name, *args):
        if name == "model.layers.0.mlp.down_proj":
            assert ahead.wait(60)
            stored = load_file(path)
            stored["model.layers.1.mlp.up_proj.weight"][1, 2] += 1
            save_file(stored, path.with_suffix(".new"), {"format": "pt"})
            os.replace(path.with_suffix(".new"), path)
        if name.startswith("model.layers.2."):
            raise KeyboardInterrupt
        return fit(name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSource, "fingerprint", fingerprints)
        patch.setattr(calibrated, "binarize_linear", fits)
        with pytest.raises(KeyboardInterrupt, match="2 of 3 layers"):
            quantize_checkpoint(tmp_path / "float", tmp_path / "out", config())
    path.write_bytes(before)
    with pytest.raises(ValueError, match=r"the float weights of model\.layers\.1 are not those"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(), resume=True)


def test_a_damaged_piece_is_found(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    piece = work_directory(out) / "model.layers.0.safetensors"
    data = bytearray(piece.read_bytes())
    data[-5] ^= 1
    piece.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.safetensors, which an interrupted run finished, is damaged"
    ):
        quantize_checkpoint(finished / "float", out, config(), resume=True)
    (work_directory(out) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of an interrupted run"):
        quantize_checkpoint(finished / "float", out, config(), resume=True)


def test_two_processes_do_not_work_on_one(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    other = WorkDirectory(work_directory(out))
    other.lock()
    try:
        with pytest.raises(RuntimeError, match="Another process is binarizing into"):
            quantize_checkpoint(finished / "float", out, config(), resume=True)
        with pytest.raises(RuntimeError, match="Another process is binarizing into"):  # not: delete that directory
            quantize_checkpoint(finished / "float", out, config())
    finally:
        other.unlock()
    quantize_checkpoint(finished / "float", out, config(), resume=True)
    assert_same_files(out, finished / "out")
