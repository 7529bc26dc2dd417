"""Models that are calibrated while they load."""

from __future__ import annotations

import torch
from binarized_models import binarize
from tiny_models import outputs, text, tokens
from transformers import LlamaForCausalLM


def test_calibration_text_is_tokenized_with_the_models_tokenizer(llama):
    given = tokens(4, 16, seed=3)
    words = " ".join(f"w{index}" for index in given.flatten().tolist())
    from_text = binarize(llama, dataset=[words], num_samples=4, sequence_length=16)
    from_tokens = binarize(llama, dataset=given, num_samples=4)
    ids = tokens(1, 8)
    assert torch.equal(outputs(from_text, ids), outputs(from_tokens, ids))
    records = [model.config.quantization_config.calibration for model in (from_text, from_tokens)]
    assert records[0] == records[1]


def test_sequences_longer_than_the_model_are_cut(llama, caplog):
    with caplog.at_level("WARNING", logger="optimum_arb"):
        model = binarize(llama, dataset=[text(200)], num_samples=3, sequence_length=100)
    assert model.config.quantization_config.calibration["sequence_length"] == 64
    assert "64" in caplog.text


def test_calibration_lowers_the_output_error(llama):
    ids = tokens(8, 32, seed=5)
    expected = outputs(LlamaForCausalLM.from_pretrained(llama), ids)
    errors = [
        (outputs(binarize(llama, **choices), ids) - expected).square().mean().item()
        for choices in ({}, {"dataset": tokens(16, 32), "num_samples": 16})
    ]
    assert errors[1] < errors[0]
