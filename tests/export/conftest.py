"""A tiny binarized Llama, and tokenizers for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import VOCABULARY, binarize, byte_level_tokenizer, save_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from optimum_arb.data import bundled_text


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llama(llama_directory):
    """Binarized with the preset."""
    return binarize(llama_directory)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, words split as GPT-2 does."""
    return byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="session")
def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """BPE on whole sentences with byte fallback, as tokenizers of Llama 2 and Mistral are; a special token first."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(bundled_text("wikitext-2")[:30_000].splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
