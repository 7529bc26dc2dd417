from __future__ import annotations

import pytest


def event(name: str, cat: str, start: float, taken: float) -> dict:
    return {"name": name, "cat": cat, "ts": start, "dur": taken}


def test_per_token(script):
    per_token = script("compiled_profile").per_token
    trace = [{"name": "without a time"}]
    for token in range(6):
        at = 100.0 * token
        trace.append(event("cudaGraphLaunch", "cuda_runtime", at, 5))
        trace.append(event("one", "kernel", at + 10, 20))
        trace.append(event("two", "kernel", at + 20, 20))  # beside the first for half of its time
        trace.append(event("copy", "gpu_memcpy", at + 50, 1))
        trace.append(event("guards", "cpu_op", at + 60, 30))
    found = per_token(trace)
    assert found["wall"] == 100
    assert found["busy"] == 31
    assert found["kernels"] == 3
    assert dict(found["gpu"]) == {"one": 20, "two": 20, "copy": 1}
    assert found["host"][0] == ("guards", 30)


def test_too_few_tokens(script):
    per_token = script("compiled_profile").per_token
    with pytest.raises(ValueError, match="2 launches"):
        per_token([event("cudaGraphLaunch", "cuda_runtime", at, 1) for at in (0, 1)])
