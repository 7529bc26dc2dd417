import json

import pytest
from gguf_models import byte_level_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_arb.export import export_gguf
from optimum_arb.export.tokenizer import word_rule

gguf = pytest.importorskip("gguf")


def test_a_rule_for_words_that_llama_cpp_may_not_have(llama, tmp_path):
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer = byte_level_tokenizer(pieces)
    with pytest.raises(ValueError, match=r"Give it as pre_tokenizer .* or leave the tokenizer out \(.*--no-tokenizer"):
        export_gguf(llama, tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    export_gguf(llama, tokenizer, tmp_path / "m.gguf", pre_tokenizer="falcon")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == "falcon"


@pytest.mark.parametrize(
    "rule",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]),
    ],
)
def test_rules_that_only_look_alike(rule):
    state = json.loads(byte_level_tokenizer(rule).backend_tokenizer.to_str())
    with pytest.raises(ValueError, match="is not known"):
        word_rule(state)


def test_tokenizers_of_other_kinds(llama, tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="type WordLevel"):
        export_gguf(llama, PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "m.gguf")


def test_a_tokenizer_with_more_tokens_than_the_model(llama, tokenizer, tmp_path):
    from copy import deepcopy

    larger = deepcopy(tokenizer)
    larger.add_tokens([f"<extra {index}>" for index in range(20)])
    with pytest.raises(ValueError, match="but the model's embedding 384 rows"):
        export_gguf(llama, larger, tmp_path / "m.gguf")


def test_scores_follow_the_order_of_the_merges(llama, sentence_tokenizer, tmp_path):
    export_gguf(llama, sentence_tokenizer, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"].contents(), strict=True))
    types = dict(zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    merges = json.loads(sentence_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    first, last = "".join(merges[0]), "".join(merges[-1])
    assert scores[first] == 0
    assert scores[last] == -(len(merges) - 1)
    assert (types["<unk>"], types["<s>"], types["<0x0A>"], types[first]) == (2, 3, 6, 1)
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


@pytest.mark.parametrize(
    ("template", "expected"),
    [("$A", (False, False)), ("<s> $A", (True, False)), ("$A </s>", (False, True)), ("<s> $A </s>", (True, True))],
)
def test_special_tokens_are_added_where_the_tokenizer_adds_them(llama, tokenizer, tmp_path, template, expected):
    from copy import deepcopy

    from tokenizers import processors

    changed = deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    export_gguf(llama, changed, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = tuple(fields[f"tokenizer.ggml.add_{kind}_token"].contents() for kind in ("bos", "eos"))
    assert found == expected
