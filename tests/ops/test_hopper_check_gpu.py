"""The fused product of sm_90 is checked on the GPU before it is used; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from gpu_layers import DEVICE, NEEDS_KERNELS, TOLERANCE, error, random_input, random_weight, run

from optimum_arb.ops.backends.triton import available

pytestmark = [
    *NEEDS_KERNELS,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability(DEVICE)[0] != 9,
        reason="not a GPU of compute capability 9.0",
    ),
]


@pytest.fixture
def unknown(monkeypatch):
    """Nothing is known of the fused product; all is of the other kernels, whose checks are not to be spoiled."""
    for check in (available.fuses_hadamard, available.has_digits_kernel):
        check(DEVICE)
    if available.triton_version() < available.HOPPER_TRITON:
        pytest.skip("the fused product needs Triton 3.6")
    monkeypatch.setattr(available, "_found_hopper", {})
    monkeypatch.setattr(available, "HOPPER_TESTED", frozenset())


def warnings(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in found if not message.startswith("Compiling GPU kernels")]


def test_it_passes(unknown, caplog):
    """With room to the limit, and costs little where the programs are in Triton's cache."""
    assert available.has_hopper_kernel(DEVICE)
    assert not warnings(caplog)
    start = time.perf_counter()
    found = available._hopper_self_check(DEVICE)
    print(f"relative error {found:.1e}, {time.perf_counter() - start:.2f} s once compiled")
    assert found < TOLERANCE[torch.bfloat16]


def test_the_host_does_not_wait_once_it_is_known(unknown):
    packed = random_weight("planes-2-col", 160, 512, prepared=False)
    x = random_input(64, 512, torch.float16)
    expected = run(x, packed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(x, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert available._found_hopper == {DEVICE: True}
    assert torch.equal(found, expected)


def spoil(monkeypatch, name: str) -> None:
    from optimum_arb.ops.backends.triton import hopper, native_launch

    if name == "native":
        if native_launch.load() is None:
            pytest.skip("needs launch.c")
        monkeypatch.setattr(native_launch.NativeLaunches, "run", lambda self, *addresses: None)
        return
    make = hopper.Multiply.__init__

    def changed(self, packed, *args, **choices):
        make(self, packed, *args, **choices)
        kernel, self.rest = 4 if name == "shared" else 8, list(self.rest)
        if choices["warps"] != kernel:
            return
        if name == "shared":
            self.row_scale = self.row_scale * 1.02
        else:
            self.rest[1] -= 16  # rows, of which the last are not written

    monkeypatch.setattr(hopper.Multiply, "__init__", changed)


@pytest.mark.parametrize("name", ["shared", "split", "native"])
def test_a_wrong_kernel_is_noticed(unknown, monkeypatch, caplog, name):
    """And not used: results are exact."""
    packed = random_weight("planes-2-col", 160, 512, prepared=False)
    spoil(monkeypatch, name)
    for m in (16, 600):
        x = random_input(m, 512, torch.bfloat16)
        expected = x.double() @ packed.unpack().dequantize(torch.float64).T
        assert error(run(x, packed), expected) < TOLERANCE[torch.bfloat16]
    (told,) = warnings(caplog)
    assert "The fused wgmma product kernel is wrong here" in told
    assert available._found_hopper == {DEVICE: False}


@torch.no_grad()
def test_a_capture_before_it_is_known(unknown, caplog):
    """Another kernel is captured, which is not kept: the product is fused afterwards."""
    packed = random_weight("planes-2-col", 160, 512, prepared=False)
    x = random_input(64, 512, torch.float16)
    expected = x.double() @ packed.unpack().dequantize(torch.float64).T
    available._found_hopper[DEVICE] = False
    run(x, packed)  # compiles what is captured
    available._found_hopper.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, packed)
    assert not available._found_hopper
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, expected) < TOLERANCE[torch.float16]
    assert error(run(x, packed), expected) < TOLERANCE[torch.float16]
    assert available._found_hopper == {DEVICE: True}
    assert not warnings(caplog)
