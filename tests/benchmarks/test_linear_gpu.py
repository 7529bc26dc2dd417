"""What benchmarks/linear_gpu.py prints of what it measured."""

from __future__ import annotations

import pytest


def test_the_table_has_times_ratios_and_bandwidth(script):
    pytest.importorskip("triton")
    linear_gpu = script("linear_gpu")
    speed = 4.0e6  # bytes a microsecond
    assert linear_gpu.bandwidth_percent(16, 1000, 2000, 1, 1.0, speed) == pytest.approx(100 * (4_000_000 + 6_000) / 4e6)
    assert linear_gpu.stored_bits("2 planes") == 2.25
    rows = [
        {"kernel": "bf16", "shape": "8x16", "tokens": 1, "us": 13.31, "bandwidth_percent": 61.0},
        {"kernel": "1 plane", "shape": "8x16", "tokens": 1, "us": 5.1, "times": 2.61, "bandwidth_percent": 11.4},
        {"kernel": "1 plane", "shape": "8x16", "tokens": 4, "failed": "wrong: relative error 0.1"},
    ]
    assert linear_gpu.table(rows, [1, 4]).splitlines()[2:] == [
        "| 8x16 | bf16 | 13.3 µs, 61 % | - |",
        "| 8x16 | 1 plane | 5.1 µs, 2.61x, 11 % | failed |",
    ]
