"""Saved models load in processes that never import optimum_arb, whatever they import first."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from fresh_process import python
from tiny_models import save_tiny, text, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM, pipeline

import optimum_arb_autoload
from optimum_arb import ARBConfig, save_model

PROMPT = text(5)
# Loads the model, and prints which linear it got and whether optimum_arb came only with it.
LOAD = """
import sys
before = "optimum_arb" in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(before, type(model.model.layers[0].mlp.up_proj).__name__)
"""
# As if the package were not installed. Without its metadata torch would call nothing.
HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("optimum_arb", "optimum_arb_autoload"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("float"), "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    binarized = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    return save_model(binarized, tiny_tokenizer(), tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize(
    "first",
    [
        "import torch, transformers",
        "import transformers.modeling_utils, torch",
        # while another thread imports torch
        "import threading; threading.Thread(target=__import__, args=('torch',)).start(); "
        "import transformers.quantizers.auto",
    ],
)
def test_import_orders(model, first):
    result = python(first + "\n" + LOAD, model)
    assert result.stdout.split() == ["False", "ARBLinear"], result.stderr


def test_explicit_import_after_the_hook(model):
    code = "import transformers.quantizers.auto, optimum_arb\n" + LOAD
    assert python(code, model).stdout.split() == ["True", "ARBLinear"]


def test_pipeline_in_a_child_process(model):
    code = """
import multiprocessing, sys
def work(path, prompt, queue):
    from transformers import pipeline
    generate = pipeline("text-generation", model=path)
    queue.put(generate(prompt, max_new_tokens=5, do_sample=False)[0]["generated_text"])
"""
    # a spawned child finds its function in a file
    (model.parent / "child.py").write_text(code)
    code = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[3])
from child import work
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(sys.argv[1], sys.argv[2], queue))
    process.start()
    print(queue.get(timeout=120))
    process.join()
"""
    result = python(code, model, PROMPT, model.parent)
    generate = pipeline("text-generation", model=str(model))
    assert result.stdout.strip() == generate(PROMPT, max_new_tokens=5, do_sample=False)[0]["generated_text"]


def test_opting_out(model):
    code = """
import sys, torch, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused", "mismatch" in str(error))
import optimum_arb
"""
    result = python(code + LOAD, model, OPTIMUM_ARB_AUTOLOAD="0")
    assert result.stdout.split() == ["refused", "True", "True", "ARBLinear"], result.stderr
    assert "Unknown quantization type, got arb" in result.stderr


def test_without_the_package(model):
    """transformers refuses the packed shapes; so it does where torch calls no entry points."""
    result = python(HIDDEN + LOAD, model, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode != 0
    assert result.stdout == ""
    assert "Unknown quantization type, got arb" in result.stderr
    assert "size mismatch" in result.stderr
    assert "RuntimeError" in result.stderr.splitlines()[-1]


# In this process


class Loader:
    """Executes a module by filling in the two tables."""

    def __init__(self, tables):
        self.tables = tables

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__dict__.update(self.tables)


@pytest.fixture
def finder(monkeypatch):
    """The finder before a registry of transformers that a test makes up."""

    def make(find_spec) -> optimum_arb_autoload._Finder:
        other = type("Other", (), {"find_spec": staticmethod(find_spec)})
        found = optimum_arb_autoload._Finder()
        monkeypatch.setattr(sys, "meta_path", [found, other])
        return found

    return make


def execute(spec: ModuleSpec, monkeypatch) -> ModuleType:
    module = ModuleType(spec.name)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_tables_of_an_unknown_kind_stay(finder, monkeypatch):
    name = optimum_arb_autoload.REGISTRY
    tables = {optimum_arb_autoload.TABLES[0]: ["a list"]}
    spec = finder(lambda *args: ModuleSpec(name, Loader(tables))).find_spec(name)
    assert vars(execute(spec, monkeypatch))[optimum_arb_autoload.TABLES[0]] == ["a list"]


@pytest.mark.parametrize("loader", [None, object()])
def test_loaders_that_cannot_be_extended(finder, loader):
    name = optimum_arb_autoload.REGISTRY
    assert finder(lambda *args: ModuleSpec(name, loader)).find_spec(name) is None


def test_a_finder_that_fails(finder):
    def fail(*args):
        raise OSError("broken")

    assert finder(fail).find_spec(optimum_arb_autoload.REGISTRY) is None


def test_a_package_that_cannot_be_imported(finder, monkeypatch):
    name = optimum_arb_autoload.REGISTRY
    tables = {table: {"gptq": int} for table in optimum_arb_autoload.TABLES}
    module = execute(finder(lambda *args: ModuleSpec(name, Loader(tables))).find_spec(name), monkeypatch)
    monkeypatch.setitem(sys.modules, "optimum_arb", None)
    for table in [vars(module)[table] for table in optimum_arb_autoload.TABLES]:
        assert "gptq" in table
        assert "awq" not in table
        for ask in (table.__contains__, table.__getitem__, table.get):
            with pytest.raises(ImportError, match=r"binarized by optimum_arb.*pip install -U optimum-arb"):
                ask("arb")


def test_activating_never_raises(monkeypatch):
    monkeypatch.setattr(optimum_arb_autoload, "sys", None)
    optimum_arb_autoload.activate()
    monkeypatch.setattr(optimum_arb_autoload, "os", None)
    optimum_arb_autoload.activate()


def test_only_the_standard_library_is_imported():
    code = "import sys; old = set(sys.modules); import optimum_arb_autoload; print(*set(sys.modules) - old)"
    root = optimum_arb_autoload.__file__.rpartition(os.sep)[0]
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert "optimum_arb_autoload" in result.stdout
    assert not {"torch", "transformers", "optimum_arb", "importlib.metadata", "typing"} & set(result.stdout.split())


def test_installed_entry_point():
    points = importlib.metadata.entry_points(group="torch.backends")
    values = [point.value for point in points if point.name == "optimum_arb"]
    if not values:
        pytest.skip("the installed metadata are older than this entry point: install the checkout again")
    assert values == ["optimum_arb_autoload:activate"]
