"""Perplexity against a direct computation, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_arb.data import BUNDLED_TEXTS, bundled_text
from optimum_arb.evaluate import perplexity
from optimum_arb.evaluate.perplexity import read_text


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model("LlamaForCausalLM")


class Characters:
    """A tokenizer: one token a character; special tokens would be seen."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        self.calls += 1
        ids = [ord(character) % VOCABULARY for character in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def tokens(count: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def direct(model: LlamaForCausalLM, ids: torch.Tensor, length: int, windows: int) -> float:
    """Mean negative log likelihood, one token at a time in float64."""
    total, count = 0.0, 0
    for window in range(windows):
        part = ids[window * length : (window + 1) * length]
        with torch.no_grad():
            logits = model(input_ids=part[None]).logits[0].double()
        for position in range(length - 1):
            total -= float(logits[position].log_softmax(-1)[part[position + 1]])
            count += 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_matches_a_direct_computation(model, batch_size):
    ids = tokens(101)  # five windows of 20; the last token is dropped
    result = perplexity(model, ids, context_length=20, batch_size=batch_size)
    expected = direct(model, ids, 20, 5)
    assert result.negative_log_likelihood == pytest.approx(expected, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.windows, result.tokens, result.context_length) == (5, 5 * 19, 20)


def test_windows_longer_than_a_chunk_of_logits(model):
    model_long = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "max_position_embeddings": 600}))
    ids = tokens(600)
    result = perplexity(model_long, ids, context_length=600)
    assert result.negative_log_likelihood == pytest.approx(direct(model_long.eval(), ids, 600, 1), abs=1e-5)


def test_first_windows_only(model):
    ids = tokens(100)
    assert perplexity(model, ids, context_length=20, max_windows=2).negative_log_likelihood == pytest.approx(
        perplexity(model, ids[:40].tolist(), context_length=20).negative_log_likelihood, abs=1e-6
    )
    assert perplexity(model, ids[None], context_length=20, max_windows=99).windows == 5


def test_text_is_tokenized_once_without_special_tokens(model):
    tokenizer = Characters()
    text = "the quick brown fox jumps over the lazy dog " * 3
    result = perplexity(model, tokenizer, text=[text, text], context_length=32)
    ids = torch.tensor([ord(character) % VOCABULARY for character in text + "\n\n" + text])
    assert tokenizer.calls == 1
    assert result.windows == len(ids) // 32
    assert result.negative_log_likelihood == pytest.approx(direct(model, ids, 32, result.windows), abs=1e-5)


def test_half_precision_logits_are_summed_in_double(model):
    ids = tokens(60)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    assert perplexity(half, ids, context_length=60).negative_log_likelihood == pytest.approx(
        direct(half.eval(), ids, 60, 1), abs=1e-5
    )


def test_training_mode_is_restored(model):
    model.train()
    try:
        perplexity(model, tokens(20), context_length=20)
        assert model.training
    finally:
        model.eval()


def test_result_is_plain_and_readable(model):
    result = perplexity(model, tokens(1000), context_length=50)
    assert result.to_dict()["tokens"] == 980
    assert "980 tokens predicted in 20 windows of 50" in str(result)


def test_text_shorter_than_a_window(model):
    with pytest.raises(ValueError, match="'token ids' has 19 tokens, fewer than one window of 20"):
        perplexity(model, tokens(19), context_length=20)


@pytest.mark.parametrize("wrong", [VOCABULARY, -100])
def test_tokens_that_the_model_does_not_know(model, wrong):
    ids = tokens(64)
    ids[50] = wrong
    with pytest.raises(ValueError, match=f"has the token id {wrong}, but the model's embedding 96 rows: use the model"):
        perplexity(model, ids, context_length=20)
    assert perplexity(model, ids, context_length=20, max_windows=2).windows == 2


def test_token_ids_that_are_no_whole_numbers(model):
    with pytest.raises(ValueError, match=r"token ids are torch\.float32"):
        perplexity(model, tokens(64) / 2, context_length=20)
    with pytest.raises(ValueError, match="has 0 tokens"):
        perplexity(model, [], context_length=20)


def test_window_longer_than_the_positions(model):
    with pytest.raises(ValueError, match="context_length=65 is more than the 64 positions"):
        perplexity(model, tokens(200), context_length=65)


@pytest.mark.parametrize("arguments", [{"context_length": 1}, {"max_windows": 0}, {"batch_size": 0}])
def test_arguments_out_of_range(model, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=. must be a whole number"):
        perplexity(model, tokens(64), **{"context_length": 8, **arguments})


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_not_finite_logits_name_the_window(model, batch_size):
    ids = tokens(80) % 40
    ids[65] = 45  # a token of window 3 alone
    broken = LlamaForCausalLM(model.config).eval()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.get_input_embeddings().weight[45] = float("nan")
    with pytest.raises(ValueError, match="not finite in window 3 of 'token ids'"):
        perplexity(broken, ids, context_length=20, batch_size=batch_size)


def test_texts(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("hällo", encoding="utf-8")
    assert read_text(path) == ("text.txt", "hällo")
    assert read_text(str(path)) == ("text.txt", "hällo")
    path.write_text("hällo", encoding="utf-8-sig")
    assert read_text(path) == ("text.txt", "hällo")
    assert read_text(["a", "b"]) == ("2 given texts", "a\n\nb")
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"'text\.txt' is empty"):
        read_text(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text file"):
        read_text(path)
    with pytest.raises(FileNotFoundError, match="neither a file nor a bundled text"):
        read_text("no-such-text")


def test_bundled_texts_are_the_two_splits():
    valid, test = bundled_text("wikitext-2"), bundled_text("wikitext-2-test")
    assert valid.lstrip().startswith("= Homarus gammarus =")
    assert test.lstrip().startswith("= Robert <unk> =")
    assert read_text("wikitext-2-test") == ("wikitext-2-test", test)
    assert set(BUNDLED_TEXTS) == {"wikitext-2", "wikitext-2-test"}
    with pytest.raises(ValueError, match="no bundled text 'wikitext-103'"):
        bundled_text("wikitext-103")
