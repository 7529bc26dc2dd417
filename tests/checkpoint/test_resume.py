"""Interrupted runs go on behind their last finished layer, to the files of a run that was not interrupted."""

from __future__ import annotations

import pytest
from interruptions import LAYERS, config, count_binarized, interrupt
from test_quantize_checkpoint import assert_same_files, save
from tiny_models import tokens

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.checkpoint.disk_activations import DiskActivations
from optimum_arb.checkpoint.run import work_directory
from optimum_arb.loading import calibrated


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("after", "layers"), [(3, 0), (9, 1), (20, 2)])
def test_goes_on_behind_the_last_finished_layer(tmp_path, monkeypatch, finished, after, layers, on_disk):
    out = tmp_path / "out"
    message = interrupt(monkeypatch, after, finished / "float", out, config(), activations_on_disk=on_disk)
    assert not out.exists()
    if not layers:
        assert message == "interrupted before a layer was finished"
        assert list(tmp_path.iterdir()) == []
    else:
        assert message.startswith(f"interrupted: {layers} of {LAYERS} layers are finished and kept in ")
        assert "--resume" in message
    count, result = count_binarized(
        monkeypatch, finished / "float", out, config(), resume=True, activations_on_disk=on_disk
    )
    assert count == 7 * (LAYERS - layers)
    assert result.resumed_layers == layers
    assert_same_files(out, finished / "out")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("family", "after"),
    [("MixtralForCausalLM", 6), ("GptOssForCausalLM", 7), ("OPTForCausalLM", 13)],
)
def test_of_other_families(tmp_path, monkeypatch, family, after):
    """Packed experts, transposed experts with biases, linears outside of the layers."""
    save(tmp_path / "float", family)
    choices = ARBConfig(dataset=tokens(4), block_size=64)
    quantize_checkpoint(tmp_path / "float", tmp_path / "expected", choices)
    interrupt(monkeypatch, after, tmp_path / "float", tmp_path / "out", choices)
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", choices, resume=True)
    assert result.resumed_layers == (2 if family == "OPTForCausalLM" else 1)
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_interrupted_again_and_again(tmp_path, monkeypatch, finished):
    for _ in range(LAYERS - 1):
        interrupt(monkeypatch, 10, finished / "float", tmp_path / "out", config(), resume=True)
    count, result = count_binarized(monkeypatch, finished / "float", tmp_path / "out", config(), resume=True)
    assert (count, result.resumed_layers) == (7, LAYERS - 1)
    assert_same_files(tmp_path / "out", finished / "out")


def test_hidden_states_in_memory_and_on_disk_can_change(tmp_path, monkeypatch, finished):
    interrupt(monkeypatch, 15, finished / "float", tmp_path / "a", config(), activations_on_disk=True)
    quantize_checkpoint(finished / "float", tmp_path / "a", config(), resume=True)
    interrupt(monkeypatch, 15, finished / "float", tmp_path / "b", config())
    quantize_checkpoint(finished / "float", tmp_path / "b", config(), resume=True, activations_on_disk=True)
    for out in (tmp_path / "a", tmp_path / "b"):
        assert_same_files(out, finished / "out")


def test_outputs_of_one_name_share_no_hidden_states(tmp_path, monkeypatch, finished):
    """Two runs on one scratch disk: the second is begun and ended while the first is at work."""
    scratch = tmp_path / "scratch"
    original = calibrated.binarize_linear
    begun = []

    def another(*args):
        if args[0] == "model.layers.1.self_attn.q_proj" and not begun:
            begun.append(True)
            other = config(dataset=tokens(6, seed=1))
            quantize_checkpoint(finished / "float", tmp_path / "b" / "out", other, activations_on_disk=scratch)
        return original(*args)

    monkeypatch.setattr(calibrated, "binarize_linear", another)
    quantize_checkpoint(finished / "float", tmp_path / "a" / "out", config(), activations_on_disk=scratch)
    assert begun
    assert_same_files(tmp_path / "a" / "out", finished / "out")


def test_layers_that_run_again_leave_one_generation_of_hidden_states(tmp_path, monkeypatch, finished):
    """And not one each: 8.6 GB a layer of a 70B."""
    out, found = tmp_path / "out", []
    interrupt(monkeypatch, 15, finished / "float", out, config())
    advance = DiskActivations.advance

    def counted(self, layer):
        found.append(len([*self.directory.glob("*.hidden")]))
        advance(self, layer)

    monkeypatch.setattr(DiskActivations, "advance", counted)
    quantize_checkpoint(finished / "float", out, config(), resume=True, activations_on_disk=True)
    assert found == [1, 2, 2]
    assert_same_files(out, finished / "out")


def test_damaged_hidden_states_are_computed_again(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 15, finished / "float", out, config(), activations_on_disk=True)
    (kept,) = (work_directory(out) / "activations").glob("*.hidden")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(bytes(data))
    quantize_checkpoint(finished / "float", out, config(), resume=True, activations_on_disk=True)
    assert_same_files(out, finished / "out")


def test_a_finished_model_whose_files_have_other_names(tmp_path):
    """transformers saves a Llava under the names of older versions; `inspect_model` did not find its linears."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14, "projection_dim": 64}
    text = {"model_type": "llama", **sizes, "vocab_size": 96}
    own = LlavaConfig(vision_config=vision, text_config=text, image_token_index=90)
    LlavaForConditionalGeneration(own).save_pretrained(tmp_path / "float")
    first = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(dataset=None))
    again = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(dataset=None), resume=True)
    assert {m.name for m in again.report.modules} == {m.name for m in first.report.modules}
    assert again.report.packed_bytes == first.report.packed_bytes
