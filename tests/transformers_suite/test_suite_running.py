"""Running and training, as transformers' own suite (its tests/quantization) checks them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from packed_opt import IDS, packed_layers
from tiny_models import outputs, tiny_tokenizer, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from optimum_arb import ARBConfig, ARBLinear


def test_pipeline(packed):
    generator = pipeline("text-generation", model=str(packed), max_new_tokens=4, do_sample=False)
    assert generator("w5 w6")[0]["generated_text"].startswith("w5 w6")
    loaded = pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(packed),
        tokenizer=tiny_tokenizer(),
        max_new_tokens=4,
        do_sample=False,
    )
    assert loaded("w5 w6") == generator("w5 w6")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_generation_in_every_grad_mode(model, mode):
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with mode():
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, num_beams=2)[:, :8], IDS)


def test_loading_in_inference_mode(packed, source):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(packed)
        assert torch.equal(outputs(model, IDS), outputs(AutoModelForCausalLM.from_pretrained(packed), IDS))
        fresh = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
        )
        assert torch.equal(outputs(fresh, IDS), outputs(model, IDS))


def test_gradients(model):
    """As transformers trains adapters on every quantizer: the base is frozen, small layers beside it learn."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    class Adapter(nn.Module):
        def __init__(self, layer: ARBLinear):
            super().__init__()
            self.layer = layer
            self.down = nn.Linear(layer.in_features, 4, bias=False)
            self.up = nn.Linear(4, layer.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.layer(x) + self.up(self.down(x))

    expected = outputs(model, IDS)
    for name, layer in packed_layers(model).items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            model.set_submodule(name, Adapter(layer))
    assert torch.equal(outputs(model, IDS), expected)
    model(IDS, labels=IDS).loss.backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert len(adapters) == 6
    for adapter in adapters:
        assert adapter.up.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in adapter.layer.parameters())


def test_training_without_adapters_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


def test_losing_the_model_frees_it(packed):
    """Neither hooks nor caches of this package keep a model alive."""
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=ARBConfig(backend="dequantize"))
    outputs(model, IDS)
    gone = weakref.ref(packed_layers(model)["model.decoder.layers.0.fc1"])
    del model
    gc.collect()
    assert gone() is None
