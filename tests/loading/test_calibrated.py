"""Models that are calibrated while they load."""

from __future__ import annotations

import torch
from binarized_models import binarize
from tiny_models import outputs, text, tokens
from transformers import BioGptConfig, BioGptForSequenceClassification, LlamaForCausalLM

from optimum_arb import ARBConfig, model_report


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


def test_a_classifier_that_can_be_asked_for_few_logits_needs_all(tmp_path):
    """BioGPT's looks for the last token that is no padding among the logits that are left."""
    config = BioGptConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    BioGptForSequenceClassification(config).save_pretrained(tmp_path)
    model = BioGptForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    )
    assert all(module.output_error is not None for module in model_report(model).modules)
