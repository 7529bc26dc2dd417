"""Page-locked memory of the hidden states: what torch rounds a piece up to is used."""

from __future__ import annotations

import pytest

from optimum_arb.calibration.activations import SLAB, _in_a_slab


@pytest.mark.parametrize("size", [1, 1000, 4096 * 2048 * 2, 5120 * 8192 * 2, 4096 * 8192 * 2, 8192 * 8192 * 2, 9 << 23])
def test_what_torch_rounds_up_to_is_used(size):
    count = _in_a_slab(size)
    taken = 1 << (count * size - 1).bit_length()
    assert count * size > 0.8 * taken
    assert count * size > SLAB / 2
    assert count <= max(8, SLAB // size + 8)
