"""What tuning needs beside its steps; these are tested with the layers and models that are tuned."""

from __future__ import annotations

import pytest
import torch

from optimum_arb.calibration.tuning import computing_in_float32, split_batches


def test_float32_inside_and_the_own_dtypes_behind_even_after_an_error():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.nn.LayerNorm(4))
    weight = layer[0].weight.detach().clone()

    def fail():
        with computing_in_float32(layer) as stored:
            assert all(p.dtype == torch.float32 for p in layer.parameters())
            assert set(stored.values()) == {torch.bfloat16}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert layer[0].weight.dtype == torch.bfloat16
    assert layer[0].weight.equal(weight)


def test_a_part_of_the_batches_is_held_out():
    assert split_batches(16, 0.125) == ([b for b in range(16) if b not in (4, 12)], [4, 12])
    assert split_batches(2, 0.01) == ([0], [1])
    with pytest.raises(ValueError, match="at least two calibration batches"):
        split_batches(1, 0.125)
