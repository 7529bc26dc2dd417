"""Which tokenizer or processor goes along with a model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from optimum_arb import ARBConfig, save_model
from optimum_arb.commands.loading import check_loading, load_processor, load_tokenizer


def test_a_tokenizer(float_model):
    assert isinstance(load_processor(str(float_model)), PreTrainedTokenizerFast)


@pytest.mark.parametrize("load", [load_tokenizer, load_processor])
def test_no_tokenizer_beside_a_model(float_model, tmp_path, load):
    (tmp_path / "config.json").write_text((float_model / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: save the model's own there"):
        load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Exception, match=r"(?s)^(?!.*holds no tokenizer)"):
        load(str(tmp_path))


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
    with pytest.raises(FileNotFoundError, match="The model has an empty name"):
        load_processor("")
    with pytest.raises(FileNotFoundError, match="no model directory"):
        load_processor("./missing")


def test_a_name_that_is_not_cached_is_told_by_transformers():
    with pytest.raises(OSError, match=r"There is no directory me/absent, .*cached files"):
        load_processor("me/absent")


@pytest.mark.parametrize("command", ["quantize", "inspect", "evaluate", "compare", "estimate", "export", "requantize"])
def test_a_mistyped_directory_is_named(fail, tmp_path, monkeypatch, command):
    """What transformers says without a network names no model."""
    monkeypatch.chdir(tmp_path)
    out = ["out.gguf"] if command in ("quantize", "requantize", "export") else []
    assert "There is no directory smolm2, nor such a model" in fail(command, "smolm2", *out)
    (tmp_path / "file").write_text("{}")
    assert "file is a file: give the directory of the model" in fail(command, "file", *out)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert "config.json is no JSON file, or is damaged" in fail(command, "damaged", *out)


@pytest.mark.parametrize("command", ["quantize", "requantize", "evaluate", "evaluate --measure generation", "compare"])
@pytest.mark.parametrize("option", ["dtype", "device-map"])
def test_a_dtype_or_a_device_that_there_is_not(
    fail, float_model, binarized_model, tmp_path, monkeypatch, command, option
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    value, message = {"dtype": ("nope", "dtype='nope' is unknown"), "device-map": ("cuda:0", "needs a GPU")}[option]
    command, *more = command.split()
    model = binarized_model if command == "requantize" else float_model
    out = [tmp_path / "out"] if "quantize" in command else []
    assert message in fail(command, model, *out, *more, f"--{option}", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "torch.float32", "nn", ""])
def test_what_is_no_float_dtype(dtype):
    with pytest.raises(ValueError, match="is unknown"):
        check_loading(dtype, "cpu")


def test_dtypes_and_devices_that_there_are():
    for dtype in ("auto", "float32", "bfloat16", "float16", "float64"):
        check_loading(dtype, "auto")
