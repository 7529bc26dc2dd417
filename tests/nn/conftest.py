"""What tests of several layers need."""

import pytest
import torch

from optimum_arb.nn import compiled


@pytest.fixture
def compiled_on_a_gpu(monkeypatch):
    """Code that is compiled takes the way of a GPU: its operators run on a CPU too."""
    torch.compiler.reset()
    monkeypatch.setattr(compiled, "on_gpu", lambda x: True)
    yield
    torch.compiler.reset()
