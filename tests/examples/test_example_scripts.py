"""The examples that take a model, on a tiny random one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import python
from tiny_models import VOCABULARY, save_tiny, text, tiny_model, tiny_tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_arb import ARBConfig, save_model
from optimum_arb.commands.printing import size
from optimum_arb.data import bundled_text
from optimum_arb.inspection import inspect_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SMALL = ("--num-samples", "4", "--sequence-length", "32", "--context-length", "32", "--max-windows", "3")
RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("full") / "full", "LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def packed(full) -> Path:
    config = ARBConfig(dataset=None, block_size=64)
    model = AutoModelForCausalLM.from_pretrained(full, quantization_config=config)
    save_model(model, AutoTokenizer.from_pretrained(full), full.parent / "packed")
    return full.parent / "packed"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """The example with the distribution's entry points, so that binarized models load without an import."""
    return python(RUN, EXAMPLES / name, *arguments)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs an example in this process, which saves the imports, and returns what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield call
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


def test_quickstart(tmp_path, script):
    """The table's bits and bytes are those of the files that it wrote."""
    source = save_tiny(tmp_path / "full", "LlamaForCausalLM", max_position_embeddings=128)
    tokenizer = tiny_tokenizer()
    words = list(dict.fromkeys(bundled_text("wikitext-2")[:2000].split()))[: VOCABULARY - 5]
    tokenizer.backend_tokenizer.model = WordLevel(
        {
            **dict(zip(words, range(5, VOCABULARY), strict=True)),
            "<pad>": 0,
            "<s>": 1,
            "</s>": 2,
            "<unk>": 3,
            "<mask>": 4,
        },
        unk_token="<unk>",
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(source)
    printed = script("quickstart.py", "--model", source, "--quick", "--directory", tmp_path / "out")
    rows = {line.split("  ")[0]: re.split(r"  +", line.strip()) for line in printed.splitlines() if "  " in line}
    assert rows["full precision"][1:3] == [
        "32",
        size(sum(p.numel() * 4 for p in tiny_model("LlamaForCausalLM").parameters())),
    ]
    for name in ("round-to-nearest", "arb-hrc, 1 plane", "arb-hrc, 2 planes"):
        out = tmp_path / "out" / name.replace(", ", "-").replace(" ", "-")
        found = inspect_model(out)
        assert rows[name][1:3] == [f"{found.bits_per_weight:.3f}", size((out / "model.safetensors").stat().st_size)]
        assert float(rows[name][3].replace(",", "")) > 1
    assert "The capital of France is ..." in printed


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_own_data(full, tmp_path, script, suffix):
    documents = [text(60, seed) for seed in range(40)]
    lines = documents if suffix == ".txt" else [json.dumps({"body": document}) for document in documents]
    source = tmp_path / f"texts{suffix}"
    source.write_text("\n".join([*lines, ""]))
    printed = script("own_data.py", full, source, tmp_path / "out", "--field", "body", *SMALL)
    assert "36 documents to calibrate on, 4 held out" in printed
    rows = dict(re.findall(r"^(float|binarized) .* ([\d,.]+)$", printed, re.MULTILINE))
    assert float(rows["binarized"]) < 2 * float(rows["float"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["calibration"]["samples"] == 4
    assert config["calibration"]["dataset"] == "custom"
    assert config["bits_per_weight"] == pytest.approx(2.667, abs=1e-3)


def test_own_data_needs_documents(full, tmp_path, script, capsys):
    (tmp_path / "one.txt").write_text(text(60))
    with pytest.raises(SystemExit, match="2"):
        script("own_data.py", full, tmp_path / "one.txt", tmp_path / "out", *SMALL)
    assert "holds 1 documents: at least 2 are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compare_methods(full, tmp_path, script):
    script("compare_methods.py", full, "--methods", "rtn,arb-hrc:2", "--out", tmp_path, *SMALL)
    rows = {line.split(" | ")[0].strip("| "): line for line in (tmp_path / "compare.md").read_text().splitlines()}
    assert list(rows)[2:] == ["full", "rtn", "arb-hrc:2"]
    perplexities = {name: float(row.split(" | ")[5].replace(",", "")) for name, row in list(rows.items())[2:]}
    assert perplexities["arb-hrc:2"] < perplexities["rtn"]
    assert (tmp_path / "compare.svg").is_file() == bool(importlib.util.find_spec("matplotlib"))


def test_push_to_local_hub(packed):
    result = run("push_to_local_hub.py", packed, "--prompt", "w5 w9 w11")
    assert result.returncode == 0, result.stderr
    assert re.search(r"uploaded: http://127\.0\.0\.1:\d+/me/binarized/commit/\w{40}", result.stdout)
    assert "loaded me/binarized: 14 binarized modules at 1.486 true bits" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("w5 w9 w11")


def test_serve(packed):
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        result = run("serve.py", packed)
        assert result.returncode == 2
        assert f"the server needs {', '.join(missing)}: pip install 'transformers[serving]'" in result.stderr
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = run("serve.py", packed, "--port", port, "--prompt", "w5 w9 w11", "--max-tokens", 5, "--timeout", 120)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("w5 w9 w11")]
    assert len(line) > len("w5 w9 w11")


def test_notebook(full, tmp_path):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)  # outputs are stripped
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    result = python(code, MODEL=str(full), OUT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert re.search(r"^2\.667 true bits a weight: perplexity [\d,.]+, [\d.]+ times", result.stdout, re.MULTILINE)
    assert "The capital of France is" in result.stdout
    assert (tmp_path / "binarized" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_explain_themselves(name):
    """The docstring's commands name the file, and every option that they use exists."""
    source = (EXAMPLES / name).read_text()
    commands = re.findall(rf"^    python examples/{re.escape(name)}(.*)$", source, re.MULTILINE)
    assert commands
    for option in re.findall(r"--[a-z][a-z-]+", " ".join(commands)):
        assert f'"{option}"' in source


def test_the_site_has_every_page():
    """Where mkdocs is not installed: no page of docs/ and no example is missing from the navigation."""
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    examples = {
        f"examples/{path.stem}{'_notebook' if path.suffix == '.ipynb' else ''}.md"
        for path in EXAMPLES.iterdir()
        if not path.name.startswith((".", "__"))
    }
    made = {"readme.md", "contributing.md"}
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")} | examples | made


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (nox -s docs)")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "quantize_checkpoint" in (tmp_path / "api.html").read_text()
