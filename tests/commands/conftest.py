"""A tiny model with a tokenizer on disk, and a way to call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from optimum_arb.commands.main import main
from optimum_arb.data import bundled_text

WORDS = 100


@pytest.fixture(scope="session")
def float_model(tmp_path_factory) -> Path:
    """A random Llama with two layers, and a tokenizer of the calibration text's first words."""
    directory = tmp_path_factory.mktemp("models") / "float"
    tiny_model("LlamaForCausalLM", vocab_size=WORDS + 1, attention_bias=True).save_pretrained(directory)
    words = list(dict.fromkeys(bundled_text("wikitext-2")[:5000].split()))[:WORDS]
    vocabulary = {"<unk>": 0, **{word: index + 1 for index, word in enumerate(w for w in words if w != "<unk>")}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def binarized_model(float_model, tmp_path_factory) -> Path:
    """The same, binarized with calibration, one module in float and one at two planes."""
    directory = tmp_path_factory.mktemp("models") / "binarized"
    options = ["--num-samples", "2", "--sequence-length", "32", "--override", "down_proj=planes:2"]
    options += ["--modules-to-not-convert", "layers.1.mlp.up_proj"]
    assert main(["quantize", str(float_model), str(directory), *options]) == 0
    return directory


@pytest.fixture
def call(capsys) -> Callable[..., Any]:
    """Runs a command that must succeed; returns its stdout, parsed where --json was given."""

    def run(*arguments: object) -> Any:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in arguments else out

    return run


@pytest.fixture
def fail(capsys) -> Callable[..., str]:
    """Runs a command that must fail on its input; returns the one line on stderr."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("optimum-arb: error: ")]
        assert len(lines) == 1
        assert "Traceback" not in captured.err
        return lines[0].removeprefix("optimum-arb: error: ")

    return run
