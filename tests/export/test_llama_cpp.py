"""The exported files run in llama.cpp itself, where llama-cpp-python knows Q1_0."""

import contextlib

import numpy as np
import pytest
import torch
from gguf_models import VOCABULARY, binarize, byte_level_tokenizer, save_model
from tokenizers import Regex, pre_tokenizers

from optimum_arb import ARBConfig
from optimum_arb.export import export_gguf
from optimum_arb.nn import ARBLinear

llama_cpp = pytest.importorskip("llama_cpp")
TOKENS = torch.randint(2, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1))
TEXT = "In 2010 it's the game's  2nd 12345 sequel,\n\nthey'll say:\tnaïve — 東京! <unk>x"


@pytest.fixture(autouse=True)
def weights_as_they_are(monkeypatch):
    """Weights are not repacked: the repacked kernels of some builds use AMX, which a virtual machine may announce and
    not allow."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_repacking():
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_repacking)


def load(path, **options):
    """The model in llama.cpp, keys and values in float32."""
    try:
        return llama_cpp.Llama(
            str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, **options
        )
    except ValueError:
        pytest.skip("this llama-cpp-python cannot load the file: it may be older than Q1_0")


def logits(model, ids):
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def round_activations(x):
    """x in ggml's Q8_0, which llama.cpp multiplies Q1_0 and Q4_0 with: blocks of 32, scale max|x| / 127 in float16."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0)
    codes = codes.abs().add(0.5).floor() * codes.sign()  # roundf: halves away from zero
    return (codes * scale.half().float()).flatten(-2)


@contextlib.contextmanager
def rounded_activations(model):
    """What llama.cpp computes, in transformers: the inputs of every binarized linear rounded to Q8_0."""
    modules = [module for module in model.modules() if isinstance(module, ARBLinear)]
    hooks = [m.register_forward_pre_hook(lambda _, args: (round_activations(args[0]),)) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check_logits(model, path):
    """llama.cpp's logits are those of transformers with rounded activations, and near those without.

    Where an input lies between two codes it may be rounded the other way, and all tokens after it see that: hence
    several short texts, and a wide bound on all tokens beside the tight one.
    """
    loaded = load(path)
    found = torch.stack([logits(loaded, ids) for ids in TOKENS.tolist()])
    plain = model(TOKENS).logits
    with rounded_activations(model):
        rounded = model(TOKENS).logits
    difference = (found - rounded).norm(dim=-1) / rounded.norm(dim=-1)
    assert float(difference.quantile(0.3)) < 1e-5
    assert float(difference.max()) < 0.05
    assert float((found - plain).norm() / plain.norm()) < 0.05


def test_logits_of_llama(llama, tmp_path):
    export_gguf(llama, None, tmp_path / "m.gguf")
    check_logits(llama, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Llama", {"hidden_size": 192, "intermediate_size": 160, "head_dim": 48}),  # Q4_0 throughout
        (
            "Llama",
            {
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
        ("Mistral", {"sliding_window": 64}),
        ("Qwen2", {}),
        ("Qwen3", {"num_key_value_heads": 1, "head_dim": 128}),
    ],
)
def test_logits_of_other_models(tmp_path, family, changes):
    model = binarize(save_model(tmp_path / "float", family, **changes))
    report = export_gguf(model, None, tmp_path / "m.gguf")
    assert report.exact
    check_logits(model, tmp_path / "m.gguf")


def test_logits_with_the_order_and_scales_of_down_proj_folded(llama_directory, tmp_path):
    config = ARBConfig.for_gguf(dataset=TOKENS, overrides={"down_proj": {"act_order": True, "col_scale": True}})
    model = binarize(llama_directory, config)
    export_gguf(model, None, tmp_path / "m.gguf", allow_lossy=True)
    found = logits(load(tmp_path / "m.gguf"), TOKENS.flatten()[:60].tolist())
    with torch.no_grad():
        plain = model(TOKENS.flatten()[None, :60]).logits[0]
    # the inputs of down_proj are rounded after the scale, not before: not the same rounding
    assert float((found - plain).norm() / plain.norm()) < 0.05


def test_greedy_text(llama, tokenizer, tmp_path):
    """Token for token what transformers generates with rounded activations."""
    export_gguf(llama, tokenizer, tmp_path / "m.gguf")
    prompt = tokenizer("The game")["input_ids"]
    with rounded_activations(llama):
        expected = llama.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1
        )
    model = load(tmp_path / "m.gguf")
    found = list(prompt)
    for _ in range(24):
        found.append(int(logits(model, found)[-1].argmax()))
    assert found == expected[0].tolist()


def split(pattern):
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


_COMMON = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


@pytest.mark.parametrize(
    ("name", "rule", "model"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
        (
            "smollm",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            {},
        ),
        ("llama-bpe", split(_COMMON % "\\p{N}{1,3}"), {"ignore_merges": True}),
        ("smaug-bpe", split(_COMMON % "\\p{N}{1,3}"), {}),
        ("qwen2", split(_COMMON % "\\p{N}"), {}),
    ],
)
def test_byte_level_tokens(llama, tmp_path, name, rule, model):
    tokenizer = byte_level_tokenizer(rule, **model)
    export_gguf(llama, tokenizer, tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf", vocab_only=True)
    assert model.metadata["tokenizer.ggml.pre"] == name
    assert model.tokenize(TEXT.encode(), add_bos=True) == tokenizer(TEXT)["input_ids"]
    assert model.detokenize(tokenizer(TEXT)["input_ids"]).decode() == TEXT


def test_sentence_tokens(llama, sentence_tokenizer, tmp_path):
    export_gguf(llama, sentence_tokenizer, tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf", vocab_only=True)
    text = TEXT.removesuffix("<unk>x")  # here a special token, which llama.cpp does not read from text by default
    expected = sentence_tokenizer(text)["input_ids"]
    assert expected[0] == sentence_tokenizer.bos_token_id
    assert model.tokenize(text.encode(), add_bos=True) == expected
