"""The model of `benchmarks/large_shapes.py`, of a small shape with grouped key and value heads, as a 70B has."""

import json

import torch
from transformers import AutoModelForCausalLM


def test_the_checkpoint_is_a_whole_model(script, monkeypatch, tmp_path):
    large_shapes = script("large_shapes")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    monkeypatch.setitem(large_shapes.SHAPES, "grouped", shape)
    monkeypatch.setattr(large_shapes, "VOCABULARY", 32)
    large_shapes.make_checkpoint(tmp_path / "model", "grouped", 2, "cpu")
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (16, 64)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert large_shapes.LAYERS.keys() == large_shapes.SHAPES.keys() - {"grouped"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_key_value_heads"] == 2
