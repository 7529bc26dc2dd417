"""Saving and copying, as transformers' own suite (its tests/quantization) checks them."""

from __future__ import annotations

import copy
import pickle
import tempfile

import pytest
import torch
from packed_opt import IDS, packed_layers
from tiny_models import outputs
from transformers import AutoModelForCausalLM, OPTForCausalLM


@pytest.mark.parametrize("how", ["plain", "shards", "state_dict"])
def test_save_and_load(model, tmp_path, how):
    kwargs = {"plain": {}, "shards": {"max_shard_size": "20KB"}, "state_dict": {"state_dict": model.state_dict()}}[how]
    model.save_pretrained(tmp_path, **kwargs)
    assert not list(tmp_path.glob("*.bin"))
    again, info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert torch.equal(outputs(model, IDS), outputs(again, IDS))


def test_save_twice(packed, tmp_path):
    """A model that was loaded binarized is saved and loaded again without loss."""
    first = AutoModelForCausalLM.from_pretrained(packed)
    first.save_pretrained(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(first, IDS), outputs(second, IDS))
    assert first.config.quantization_config.to_dict() == second.config.quantization_config.to_dict()


def test_load_state_dict(model, packed):
    other = AutoModelForCausalLM.from_pretrained(packed)
    for layer in packed_layers(other).values():
        layer.weight.data.bitwise_not_()
    assert not torch.equal(outputs(other, IDS), outputs(model, IDS))
    assert not any(other.load_state_dict(model.state_dict()))
    assert torch.equal(outputs(other, IDS), outputs(model, IDS))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, how):
    copied = how(model)
    assert torch.equal(outputs(copied, IDS), outputs(model, IDS))
    layer = packed_layers(copied)["model.decoder.layers.0.fc1"]
    layer.weight.data.bitwise_not_()
    assert not torch.equal(outputs(copied, IDS), outputs(model, IDS))
    with tempfile.TemporaryDirectory() as path:
        copied.save_pretrained(path)
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(path), IDS), outputs(copied, IDS))


def test_dequantize(model):
    expected = outputs(model, IDS)
    model.dequantize()
    assert not packed_layers(model)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    torch.testing.assert_close(outputs(model, IDS), expected, rtol=1e-4, atol=1e-4)
    model.half()  # allowed again
