"""Which tokenizer or processor goes along with a model."""

from __future__ import annotations

import json

import pytest
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from optimum_arb import ARBConfig, save_model
from optimum_arb.commands.loading import load_processor


def test_a_tokenizer(float_model):
    assert isinstance(load_processor(str(float_model)), PreTrainedTokenizerFast)


def test_a_processor_travels_with_the_model(float_model, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(sampling_rate=8000), tokenizer).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text((float_model / "config.json").read_text())
    processor = load_processor(str(tmp_path / "source"))
    assert isinstance(processor, Wav2Vec2Processor)
    model = LlamaForCausalLM.from_pretrained(float_model, quantization_config=ARBConfig(dataset=None, block_size=64))
    saved = load_processor(str(save_model(model, processor, tmp_path / "model")))
    assert saved.feature_extractor.sampling_rate == 8000
    assert saved.tokenizer("a")["input_ids"] == processor.tokenizer("a")["input_ids"]


def test_no_directory():
    with pytest.raises(FileNotFoundError, match="no model directory"):
        load_processor("./missing")


def test_a_name_that_is_not_cached_is_told_by_transformers():
    with pytest.raises(OSError, match="cached files"):
        load_processor("me/absent")
