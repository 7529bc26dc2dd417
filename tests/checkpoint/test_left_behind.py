"""What a layer leaves behind when it is finished."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from tiny_models import save_tiny, tokens

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.calibration.progress import Progress


class Counted(Progress):
    """Tensors in memory at the first linear of each layer."""

    def __init__(self, linears: int):
        super().__init__()
        self.counts: list[int] = []
        self._linears, self._seen = linears, 0

    def linear(self, *args, **kwargs) -> None:
        super().linear(*args, **kwargs)
        if self._seen % self._linears == 0:
            for thread in threading.enumerate():
                if thread.name == "optimum_arb-behind":  # it has the layer before, until that is written
                    thread.join()
            tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
            self.counts.append(sum(not tensor.is_meta for tensor in tensors))  # a finished layer's are
        self._seen += 1


@pytest.mark.parametrize("choices", [{}, {"error_correction": 0}, {"method": "arb-dbf"}, {"method": "arb-rc"}], ids=str)
def test_no_cycle_of_references_holds_a_layers_tensors(tmp_path, choices):
    """In Python 3.12 all that a layer's runs had made was part of one: 2 GB a layer of a 7B."""
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=5)
    counted = Counted(7)
    config = ARBConfig(dataset=tokens(4, 32), num_samples=4, sequence_length=32, **choices)
    gc.collect()
    gc.disable()
    try:
        quantize_checkpoint(source, tmp_path / "packed", config, progress=counted)
    finally:
        gc.enable()
    assert len(counted.counts) == 5
    assert counted.counts[1:] == counted.counts[1:2] * 4
