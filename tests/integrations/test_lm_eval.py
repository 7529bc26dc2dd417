"""lm-evaluation-harness on binarized models: through its Python interface and its command line, with a local task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fresh_process import python
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_arb import ARBConfig

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install optimum-arb[eval]")

TASKS = Path(__file__).resolve().parents[2] / "examples" / "lm_eval_local"
QUESTIONS = [json.loads(line) for line in (TASKS / "everyday.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tiny random model whose vocabulary is the words of the task."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = [text for entry in QUESTIONS for text in (entry["question"], *entry["choices"])]
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        path / "float", quantization_config=ARBConfig(dataset=None, block_size=64)
    )
    model.save_pretrained(path / "packed")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path / "packed")
    return path / "packed"


def expected_accuracy(path) -> float:
    """The share of questions to whose answer the model gives the largest log-likelihood, counted by hand."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    right = 0
    for entry in QUESTIONS:
        context = tokenizer(entry["question"], add_special_tokens=False)["input_ids"]
        scores = []
        for choice in entry["choices"]:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores.append(sum(logs[len(context) - 1 + i, token].item() for i, token in enumerate(answer)))
        right += max(range(len(scores)), key=scores.__getitem__) == entry["answer"]
    return right / len(QUESTIONS)


def test_hflm_with_a_loaded_model(packed):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(packed)
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(packed), batch_size=4)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(harness, tasks=["arb_everyday"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["arb_everyday"]["acc,none"] == pytest.approx(expected_accuracy(packed))
    assert results["n-samples"]["arb_everyday"]["effective"] == len(QUESTIONS)


def test_command_line(packed, tmp_path):
    arguments = [
        "--model=hf",
        f"--model_args=pretrained={packed},dtype=float32",
        "--tasks=arb_everyday",
        f"--include_path={TASKS}",
        "--batch_size=4",
        "--device=cpu",
        f"--output_path={tmp_path}",
    ]
    # nothing here imports this package: its entry point in torch does, once the model asks for it
    script = """
import sys
from lm_eval.__main__ import cli_evaluate
assert "optimum_arb" not in sys.modules
sys.argv[0] = "lm_eval"
cli_evaluate()
"""
    run = python(script, "run", *arguments, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["arb_everyday"]
    assert results["acc,none"] == pytest.approx(expected_accuracy(packed))
    assert "arb_everyday" in run.stdout
