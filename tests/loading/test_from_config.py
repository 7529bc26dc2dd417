"""Float models from the configuration of a binarized one: as of other quantizers', `from_config` takes no notice."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tiny_models import outputs, tiny_tokenizer, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from optimum_arb import ARBConfig, ARBLinear, save_model

IDS = tokens(1, 8)


def from_config(packed):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(packed))


def from_a_loaded_model(packed):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaForCausalLM.from_pretrained(packed).config)


@pytest.mark.parametrize("save", ["save_pretrained", "save_model"])
@pytest.mark.parametrize("make", [from_config, from_a_loaded_model])
def test_it_can_be_saved_and_loaded(packed, tmp_path, make, save, caplog):
    """It was saved with the quantization_config, and refused when it was loaded."""
    model = make(packed)
    assert not any(isinstance(module, ARBLinear) for module in model.modules())
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)  # trained
    before = model.config.quantization_config
    with caplog.at_level(logging.WARNING, "optimum_arb.hub.methods"):
        if save == "save_pretrained":
            model.save_pretrained(tmp_path / "float")
        else:
            save_model(model, tiny_tokenizer(), tmp_path / "float")
    assert "LlamaForCausalLM is a float model" in caplog.text
    assert model.config.quantization_config is before
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(outputs(again, IDS), outputs(model, IDS))
    config = ARBConfig(dataset=None, block_size=64)
    binarized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert isinstance(binarized.model.layers[0].mlp.up_proj, ARBLinear)


def test_a_part_of_a_binarized_model_stays_one(packed, tmp_path):
    """It has no quantizer of its own, and its configuration is that of the whole."""
    whole = LlamaForCausalLM.from_pretrained(packed)
    whole.model.save_pretrained(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part")
    assert isinstance(part.layers[0].mlp.up_proj, ARBLinear)
    with torch.no_grad():
        assert torch.equal(part(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_float_weights_under_such_a_configuration(llama, packed):
    with pytest.raises(
        ValueError, match=r"no tensor of .*model.safetensors is packed: .*take the quantization_config out"
    ):
        LlamaForCausalLM.from_pretrained(llama, config=AutoConfig.from_pretrained(packed))
