from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny_models import text, tiny_tokenizer, tokens

from optimum_arb import ARBConfig
from optimum_arb.calibration import calibration_tokens, load_texts, token_batches
from optimum_arb.calibration.data import calibration_batch_size, calibration_record


def test_bundled_text():
    (bundled,) = load_texts("wikitext-2")
    assert bundled.startswith(" \n = Homarus gammarus = ")
    assert len(bundled) > 10**6


def test_text_files_and_lists(tmp_path):
    (tmp_path / "text.txt").write_text("w5 Größe", encoding="utf-8")
    assert load_texts(str(tmp_path / "text.txt")) == ["w5 Größe"]
    assert load_texts(["w5", "w6"]) == ["w5", "w6"]
    (tmp_path / "text.txt").write_text("w5 Größe", encoding="utf-8-sig")
    assert load_texts(str(tmp_path / "text.txt")) == ["w5 Größe"]


def test_sequences_are_the_text_from_its_start():
    words = text(100)
    config = ARBConfig(dataset=[words], num_samples=3, sequence_length=16)
    made = calibration_tokens(config, tiny_tokenizer())
    assert made.dtype == torch.int64
    assert made.flatten().tolist() == [int(word[1:]) for word in words.split()[:48]]


def test_no_special_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    made = calibration_tokens(ARBConfig(dataset=[text(32)], num_samples=2, sequence_length=16), tokenizer)
    assert not (made < 3).any()


def test_texts_are_joined_in_order():
    config = ARBConfig(dataset=["w5 w6", "w7 w8"], num_samples=1, sequence_length=4)
    assert calibration_tokens(config, tiny_tokenizer()).tolist() == [[5, 6, 7, 8]]


def test_only_as_much_text_as_needed_is_tokenized():
    """The same tokens come out of a long text and of its start, and the long one is not tokenized whole."""
    seen = []
    tokenizer = tiny_tokenizer()

    def watch(words, **kwargs):
        seen.append(len(words))
        return tokenizer(words, **kwargs)

    words = text(4000)
    config = ARBConfig(dataset=[words], num_samples=2, sequence_length=8)
    made = calibration_tokens(config, watch)
    assert made.flatten().tolist() == [int(word[1:]) for word in words.split()[:16]]
    assert max(seen) < len(words) / 10


def test_a_text_with_long_words_is_tokenized_whole():
    words = " ".join(["x" * 500] * 20)
    config = ARBConfig(dataset=[words], num_samples=2, sequence_length=8)
    assert calibration_tokens(config, tiny_tokenizer()).tolist() == [[3] * 8] * 2  # <unk>


def test_fewer_sequences_than_asked(caplog):
    config = ARBConfig(dataset=[text(50)], num_samples=8, sequence_length=16)
    with caplog.at_level("WARNING", logger="optimum_arb"):
        made = calibration_tokens(config, tiny_tokenizer())
    assert made.shape == (3, 16)
    assert "only 3 sequences" in caplog.text


def test_limits_of_the_model():
    config = ARBConfig(dataset=[text(64)], num_samples=2, sequence_length=48)
    assert calibration_tokens(config, tiny_tokenizer(), max_length=32).shape == (2, 32)
    given = ARBConfig(dataset=tokens(3, 40), num_samples=2, sequence_length=48)
    assert torch.equal(calibration_tokens(given, None, max_length=32), tokens(3, 40)[:2, :32])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches(size):
    made = tokens(8, 16)
    batches = token_batches(made, size)
    assert torch.equal(torch.cat(batches), made)
    assert max(len(batch) for batch in batches) == size


def test_batch_size_follows_from_the_length():
    assert len(token_batches(tokens(8, 1024))[0]) == 6
    assert len(token_batches(tokens(4, 8192))[0]) == 1
    assert len(token_batches(tokens(2, 10000))[0]) == 1


@pytest.mark.parametrize(
    ("device", "samples", "length", "choices", "size"),
    [
        ("cpu", 128, 2048, {}, 1),
        ("cpu", 128, 2048, {"batch_size": 4}, 1),
        ("cuda", 128, 2048, {}, 3),
        ("cuda", 128, 2048, {"batch_size": 2}, 3),  # the bits do not depend on it
        ("cuda", 32, 1024, {}, 2),  # at least 16 batches
        ("cuda", 8, 64, {}, 1),
        ("cuda", 128, 32768, {}, 1),
        ("cuda", 128, 512, {"refine": "block"}, 4),
        ("cuda", 128, 512, {"refine": "block", "batch_size": 3}, 3),
    ],
)
def test_sequences_of_a_calibration_batch(device, samples, length, choices, size):
    assert calibration_batch_size(ARBConfig(**choices), samples, length, torch.device(device)) == size


def test_record():
    made = tokens(4, 16)
    record = calibration_record(ARBConfig(dataset=made), made)
    assert record == {
        "dataset": "custom",
        "samples": 4,
        "sequence_length": 16,
        "fingerprint": hashlib.sha256(made.numpy().tobytes()).hexdigest(),
    }
    assert calibration_record(ARBConfig(), made)["dataset"] == "wikitext-2"
    assert calibration_record(ARBConfig(dataset=Path("/home/me/notes.txt")), made)["dataset"] == "notes.txt"


def test_names_that_need_the_network_say_so(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("optimum.gptq.data.get_dataset", offline)
    with pytest.raises(ValueError, match=r"c4.*could not be loaded.*no route.*wikitext-2"):
        calibration_tokens(ARBConfig(dataset="c4"), tiny_tokenizer())


def test_names_of_optimum(monkeypatch):
    examples = [{"input_ids": row[None], "attention_mask": torch.ones(1, 16)} for row in tokens(3, 16)]
    monkeypatch.setattr("optimum.gptq.data.get_dataset", lambda *args, **kwargs: examples)
    config = ARBConfig(dataset="c4", num_samples=3, sequence_length=16)
    assert torch.equal(calibration_tokens(config, tiny_tokenizer()), tokens(3, 16))
