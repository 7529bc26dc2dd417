from __future__ import annotations

import pytest

pytest.importorskip("triton.experimental.gluon")
from optimum_arb.ops.backends.triton.hopper_product import row_pieces


@pytest.mark.parametrize(
    ("split_k", "split_from", "expected"),
    [
        (1, 0, [(range(160), 1)]),
        (4, 0, [(range(160), 4)]),
        (4, 128, [(range(128), 1), (range(128, 160), 4)]),
        (1, 128, [(range(160), 1)]),
        (4, 160, [(range(160), 1)]),  # no row is behind it
        (4, 4096, [(range(160), 1)]),
    ],
)
def test_rows_of_each_launch(split_k, split_from, expected):
    assert row_pieces(160, split_k, split_from) == expected
