"""An uninterrupted run to compare with, and no thread that outlives a test."""

from __future__ import annotations

import threading

import pytest
from interruptions import LAYERS, config
from tiny_models import save_tiny

from optimum_arb import quantize_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A float model, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("finished")
    save_tiny(folder / "float", "LlamaForCausalLM", num_hidden_layers=LAYERS)
    quantize_checkpoint(folder / "float", folder / "out", config())
    return folder


@pytest.fixture(autouse=True)
def no_thread_stays():
    """However a run ended."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("optimum_arb")] == []
