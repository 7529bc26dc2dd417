"""The self-check of the fused product, which torch computes here, and what computes where it fails."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_weights import random_packed

pytest.importorskip("triton.experimental.gluon")
from emulated_products import EmulatedMultiply

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import available, dispatch, gemm, gemm_config, hopper, hopper_check
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig
from optimum_arb.ops.backends.triton.table import Entry

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE, CPU = torch.device("cuda", 0), torch.device("cpu")
SHARED, SPLIT = 4, 8  # warps
IN_A_TABLE = {"kernel": "hopper", "block_m": 64, "block_n": 64, "warps": 4, "stages": 3, "split_k": 2}


class Machine:
    """An sm_90 whose tensors are on the CPU.

    Attributes:
        launched: choices of the products, in the order of their launches.
        spoil: what a launch does to its result beside the product: the number of the launch, the choices, the result.
        capturing: whether a CUDA graph is captured.
    """

    def __init__(self) -> None:
        self.launched: list[dict[str, Any]] = []
        self.spoil: Any = None
        self.capturing = False

    def works(self, device: torch.device = DEVICE) -> bool:
        return available.has_hopper_kernel(DEVICE)


@pytest.fixture
def machine(monkeypatch):
    found = Machine()

    class Multiply(EmulatedMultiply):
        def __init__(self, *args: Any, **choices: Any):
            super().__init__(*args, **choices)
            self.choices = choices

        def _multiply(self, args: tuple[Any, ...]) -> None:
            super()._multiply(args)
            found.launched.append(self.choices)
            if found.spoil is not None:
                found.spoil(len(found.launched), self.choices, args[3])

    check = available._hopper_self_check
    monkeypatch.setattr(hopper, "Multiply", Multiply)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(available, "has_kernels", lambda device: True)
    monkeypatch.setattr(available, "_hopper_self_check", lambda device: check(CPU))
    monkeypatch.setattr(available, "_found_hopper", {})
    monkeypatch.setattr(available, "HOPPER_TESTED", frozenset())
    monkeypatch.setattr(gemm_config, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm_config, "has_hopper_kernel", found.works)
    monkeypatch.setattr(dispatch, "has_hopper_kernel", found.works)
    monkeypatch.setattr(dispatch, "has_one_bit_kernel", lambda device: True)
    monkeypatch.setattr(dispatch, "_needing_digits", {})
    monkeypatch.setattr(dispatch, "lookup", lambda *args: Entry(96, 256, 2, 64, "hopper", IN_A_TABLE, 1.0))
    dispatch._tuned.cache_clear()
    yield found
    dispatch._tuned.cache_clear()


def warnings(caplog) -> list[str]:
    """But for what is said after two seconds, which a busy machine needs."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in found if not message.startswith("Compiling GPU kernels")]


def on_a_gpu() -> PackedWeight:
    """As much of a weight there as is looked at to choose a kernel."""
    packed = random_packed(planes_layout(2, col_scale=True), 96, 256)
    there = SimpleNamespace(is_cuda=True, device=DEVICE, shape=packed.weight.shape)
    there.data_ptr, there.stride = lambda: 256, lambda dimension: 1
    packed.weight = there  # type: ignore[assignment]
    return packed


def chosen(tokens: int) -> str:
    return dispatch._config(DEVICE, torch.float16, tokens, on_a_gpu()).kernel


def test_a_kernel_that_is_right(machine, caplog):
    """Is used; both are asked, once, each twice: with parts of K and x scaled before, with scales in the kernel."""
    assert machine.works()
    assert [each["warps"] for each in machine.launched] == [SHARED, SHARED, SPLIT, SPLIT]
    first, _, second, _ = machine.launched
    assert (first["scaled"], first["split_k"], second["scaled"], second["split_k"]) == (True, 2, False, 1)
    assert [chosen(m) for m in (8, 64, 600)] == ["hopper"] * 3
    assert len(machine.launched) == 4
    assert not warnings(caplog)


def wrong(number, choices, out):
    if choices["warps"] == SPLIT:
        out.mul_(1.02)


def not_a_number(number, choices, out):
    if choices["warps"] == SHARED:
        out[:1].fill_(torch.nan)


def not_the_same_bits(number, choices, out):
    """As a native launch may compute that is not what Triton launched."""
    if number == 4:
        out[-1:, -1:].mul_(1.01)


def fails(number, choices, out):
    raise RuntimeError("ptxas said no")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong, "is wrong here (relative error 2.0e-02)"),
        (not_a_number, "is wrong here (relative error nan)"),
        (not_the_same_bits, "is wrong here (relative error inf)"),
        (fails, "does not compile here (ptxas said no)"),
    ],
)
def test_a_kernel_that_does_not_work(machine, caplog, spoil, message):
    """Is told once, and not used by any product: the next best one computes, exactly."""
    machine.spoil = spoil
    assert [chosen(m) for m in (8, 64, 600)] == ["portable", "portable", "dequantize"]
    asked = len(machine.launched)
    (told,) = warnings(caplog)
    assert message in told
    packed = random_packed(planes_layout(2, col_scale=True), 96, 256)
    x = torch.randn(17, 256, generator=torch.Generator().manual_seed(0)).half()
    assert not gemm_config.fits_hopper(packed, x.dtype)
    exact = x.double() @ packed.unpack().dequantize(torch.float64).T
    for found, config in (
        (dispatch.linear(x, packed, None), GemmConfig("dequantize")),  # what a weight on the CPU has
        (dispatch.linear(x, packed, None, batch_invariant=True), dispatch.batch_invariant_config("portable")),
        (gemm.gemm(x, packed, config=GemmConfig(**IN_A_TABLE)), GemmConfig("dequantize")),
    ):
        assert torch.equal(found, gemm.gemm(x, packed, config=config))
        assert (found - exact).norm() < 1e-3 * exact.norm()
    assert dispatch.plan_group(x, [packed, packed], [None, None], None) is None
    assert len(machine.launched) == asked
    assert len(warnings(caplog)) == 1


def test_results_that_are_not_written(machine, monkeypatch):
    """Memory that the check hands out holds no number, whatever lay there before."""
    outputs = []
    run = hopper_check._launch

    def record(plan, x, out, scratch):
        outputs.append(bool(out.isnan().all() and (scratch == 255).all()))
        run(plan, x, out, scratch)

    monkeypatch.setattr(hopper_check, "_launch", record)
    machine.spoil = lambda number, choices, out: out.view(-1)[-256:].fill_(torch.nan)
    assert not machine.works()
    assert outputs == [True] * 4


@pytest.mark.parametrize("writes", [True, False])
def test_the_native_launches(machine, monkeypatch, writes):
    """Get memory of their own, and what they do not write is noticed."""
    plans = []
    run = hopper_check._launch

    def record(plan, x, out, scratch):
        plans.append((plan, x, out))
        run(plan, x, out, scratch)

    class Native:
        def run(self, stream, x, out, extra, scratch):
            plan, given, by_triton = plans[-1]
            assert (stream, x, extra) == (77, given.data_ptr(), 0)
            assert out != by_triton.data_ptr()
            assert bool(scratch) == bool(plan.scratch)
            if writes:
                ctypes.memmove(out, by_triton.data_ptr(), by_triton.nbytes)

    monkeypatch.setattr(hopper_check, "_launch", record)
    monkeypatch.setattr(hopper_check, "prepare", lambda ready, device: Native())
    monkeypatch.setattr(hopper_check, "current_stream", lambda device: 77)
    assert machine.works() == writes
    assert len(plans) == 2


def test_what_is_chosen_in_a_capture_is_not_kept(machine, caplog):
    machine.capturing = True
    assert [chosen(m) for m in (64, 600)] == ["portable", "dequantize"]
    assert not machine.launched
    machine.capturing = False
    assert [chosen(m) for m in (64, 600)] == ["hopper"] * 2
    machine.capturing = True
    assert [chosen(m) for m in (64, 600)] == ["hopper"] * 2
    assert not warnings(caplog)


def test_weights_that_it_is_not_written_for_do_not_ask(machine):
    """Nor do inputs of float32."""
    packed = on_a_gpu()
    packed.block_size = 64
    for each, dtype in ((packed, torch.float16), (on_a_gpu(), torch.float32)):
        assert not gemm_config.fits_hopper(each, dtype)
        dispatch._config(DEVICE, dtype, 64, each)
    assert not machine.launched
    assert not available._found_hopper
