"""GPU memory over the layers of a model; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny, tokens

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.calibration.progress import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Held(Progress):
    """What tensors take on the GPU when a layer is finished."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def linear(self, *args, **kwargs) -> None:
        super().linear(*args, **kwargs)
        # cuBLAS takes 32 MB for each pair of a thread and a stream, of which the first layers do not meet all
        torch._C._cuda_clearCublasWorkspaces()
        self.bytes.append(torch.cuda.memory_allocated())


@pytest.mark.parametrize("choices", [{}, {"planes": 2}, {"error_correction": 0}, {"method": "arb-dbf"}], ids=str)
def test_layers_leave_nothing_behind(tmp_path, choices):
    """A 7B's run once held 2 GB more with every layer."""
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=12)
    held = Held()
    config = ARBConfig(dataset=tokens(4, 32), num_samples=4, sequence_length=32, **choices)
    quantize_checkpoint(source, tmp_path / "packed", config, device="cuda", progress=held)
    each = len(held.bytes) // 12
    layers = [held.bytes[start : start + each] for start in range(0, len(held.bytes), each)]
    assert len(layers) == 12
    assert max(layers[-1]) <= 1.1 * max(layers[2])
