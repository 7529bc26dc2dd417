"""Whether the GPU's kernels are used, on machines that are made up: told once, and something computes either way."""

import logging
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from optimum_arb.ops.backends import reference
from optimum_arb.ops.backends.triton import available
from optimum_arb.ops.backends.triton.available import (
    fuses_hadamard,
    has_digits_kernel,
    has_half_bits_kernel,
    has_hopper_kernel,
    has_kernels,
    has_one_bit_kernel,
)
from optimum_arb.ops.linear import _backend

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """An H200 with Triton whose kernel is right."""
    triton = types.ModuleType("triton")
    triton.__version__ = "3.6.0"
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    monkeypatch.setattr(available, "_self_check", lambda device: 3e-5)
    monkeypatch.setattr(available, "_half_self_check", lambda device: 3e-4)
    monkeypatch.setattr(available, "_transform_self_check", lambda device: 3e-4)
    monkeypatch.setattr(available, "_digits_self_check", lambda device: 3e-5)
    monkeypatch.setattr(available, "_hopper_self_check", lambda device: 3e-3)
    monkeypatch.setattr(available, "_found_hopper", {})
    monkeypatch.setattr(available, "HOPPER_TESTED", frozenset())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    checks = (has_kernels, has_one_bit_kernel, has_half_bits_kernel, fuses_hadamard, has_digits_kernel)
    for cached in checks:
        cached.cache_clear()
    yield
    for cached in checks:
        cached.cache_clear()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_good_machine(caplog):
    assert has_kernels(DEVICE)
    assert has_one_bit_kernel(DEVICE)
    assert has_half_bits_kernel(DEVICE)
    assert fuses_hadamard(DEVICE)
    assert has_hopper_kernel(DEVICE)
    assert not warnings(caplog)


def test_no_kernels_for_the_cpu(caplog):
    for device in ("cpu", "meta"):
        assert not has_kernels(torch.device(device))
        assert not has_one_bit_kernel(torch.device(device))
        assert not has_hopper_kernel(torch.device(device))
    assert not warnings(caplog)


def test_a_release_that_was_tested_is_not_checked_again(monkeypatch):
    """Neither outside of a capture nor in one."""
    monkeypatch.setattr(available, "_hopper_self_check", lambda device: 1.0)
    assert not has_hopper_kernel(DEVICE)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        monkeypatch.setattr(available, "_found_hopper", {})
        monkeypatch.setattr(available, "HOPPER_TESTED", frozenset({available.triton_version()}))
        assert has_hopper_kernel(DEVICE)


@pytest.mark.parametrize("version", ["3.3.1", "3.2.0+git1", "2.3"])
def test_triton_too_old(monkeypatch, caplog, version):
    monkeypatch.setattr(sys.modules["triton"], "__version__", version)
    check_once(caplog, f"these need Triton 3.4, which comes with torch 2.8, and {version} is installed")


@pytest.mark.parametrize("version", ["3.4.0", "3.10.1+git1", "4.0"])
def test_triton_new_enough(monkeypatch, caplog, version):
    monkeypatch.setattr(sys.modules["triton"], "__version__", version)
    assert has_kernels(DEVICE)
    assert not warnings(caplog)


def check_once(caplog, message: str) -> None:
    """The reference backend computes, which is told once; asking for the kernels by name is an error."""
    for _ in range(3):
        assert not has_kernels(DEVICE)
        assert not has_one_bit_kernel(DEVICE)
        assert _backend("auto", DEVICE) is reference
    (found,) = warnings(caplog)
    assert message in found
    for name in ("triton", "triton:batch-invariant"):
        with pytest.raises(ValueError, match=f"backend='{name}' does not run on cuda:0: it needs Triton and a GPU"):
            _backend(name, DEVICE)


def test_no_triton(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    check_once(caplog, "Triton is not installed: pip install triton")


def test_an_old_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    check_once(caplog, "these need compute capability 8.0, and Test GPU has 7.5")


@pytest.mark.parametrize("error", [2e-3, 1.0, float("nan"), float("inf")])
def test_a_wrong_answer(monkeypatch, caplog, error):
    monkeypatch.setattr(available, "_self_check", lambda device: error)
    for _ in range(3):
        assert not has_one_bit_kernel(DEVICE)
    assert has_kernels(DEVICE)  # the others
    (found,) = warnings(caplog)
    assert f"is wrong here (relative error {error:.1e}); using the others" in found


@pytest.mark.parametrize("failure", [RuntimeError("ptxas said no"), ImportError("no gluon"), AttributeError("jit")])
def test_a_kernel_that_does_not_compile(monkeypatch, caplog, failure):
    def fail(device):
        raise failure

    monkeypatch.setattr(available, "_self_check", fail)
    for _ in range(3):
        assert not has_one_bit_kernel(DEVICE)
    assert has_kernels(DEVICE)
    (found,) = warnings(caplog)
    assert f"does not compile here ({failure}); using the others" in found


def test_the_transform_of_inputs_alone(monkeypatch, caplog):
    """Wrong, or switched off, it is a launch of its own, and the products stay."""
    monkeypatch.setattr(available, "_transform_self_check", lambda device: float("nan"))
    for _ in range(3):
        assert not fuses_hadamard(DEVICE)
    assert has_half_bits_kernel(DEVICE)
    (found,) = warnings(caplog)
    assert "The fused Hadamard transform kernel is wrong here" in found
    monkeypatch.setattr(available, "_transform_self_check", lambda device: 3e-4)
    monkeypatch.setattr(available, "FUSE_HADAMARD", False)
    fuses_hadamard.cache_clear()
    assert not fuses_hadamard(DEVICE)


def test_the_kernel_for_5_to_16_tokens_alone(monkeypatch, caplog):
    """Wrong, or not to be compiled, it leaves its tokens to the others, and the one-bit kernel where it is."""

    def fail(device):
        raise RuntimeError("ptxas said no")

    for check, message in ((lambda device: float("nan"), "is wrong here"), (fail, "does not compile here (ptxas said")):
        monkeypatch.setattr(available, "_half_self_check", check)
        has_half_bits_kernel.cache_clear()
        for _ in range(3):
            assert not has_half_bits_kernel(DEVICE)
        assert has_one_bit_kernel(DEVICE)
        (found,) = warnings(caplog)
        assert f"The half-bits tensor core kernel {message}" in found
        caplog.clear()
    monkeypatch.setattr(available, "_self_check", lambda device: 1.0)
    for cached in (has_one_bit_kernel, has_half_bits_kernel):
        cached.cache_clear()
    assert not has_half_bits_kernel(DEVICE)  # it is not even asked: both read the same copy
    (found,) = warnings(caplog)
    assert "one-bit" in found


@pytest.mark.parametrize(("capability", "works"), [((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)])
def test_capabilities_of_the_one_bit_kernel(monkeypatch, caplog, capability, works):
    """Where the instruction is emulated the kernels for many tokens serve few, and nothing is wrong."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(available, "_self_check", lambda device: asked.append(device) or 0.0)
    assert has_one_bit_kernel(DEVICE) == works
    assert asked == [DEVICE] * works
    assert has_kernels(DEVICE)
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("name", "digits"),
    [("gfx90a:sramecc+:xnack-", True), ("gfx942", True), ("gfx1100", True), ("gfx906", False), ("gfx1030", False)],
)
def test_amd(monkeypatch, caplog, name, digits):
    """8-bit integers where its units multiply them."""
    found = types.SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert has_kernels(DEVICE)
    assert not has_one_bit_kernel(DEVICE)
    assert has_digits_kernel(DEVICE) == digits
    assert not warnings(caplog)


def test_digits_where_the_one_bit_kernel_is_wrong(monkeypatch, caplog):
    """They are checked on their own, and not at all on a CPU."""
    monkeypatch.setattr(available, "_self_check", lambda device: 1.0)
    assert not has_one_bit_kernel(DEVICE)
    assert has_digits_kernel(DEVICE)
    assert not has_digits_kernel(torch.device("cpu"))
    monkeypatch.setattr(available, "_digits_self_check", lambda device: float("nan"))
    has_digits_kernel.cache_clear()
    for _ in range(2):
        assert not has_digits_kernel(DEVICE)
    assert [message.split(" is wrong here")[0] for message in warnings(caplog)] == [
        "The one-bit tensor core kernel",
        "The 8-bit digits kernel",
    ]


def test_the_fused_product_is_checked_once(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(available, "_hopper_self_check", lambda device: asked.append(device) or 3e-3)
    other = torch.device("cuda", 1)
    for device in (DEVICE, DEVICE, other, DEVICE, other):
        assert has_hopper_kernel(device)
    assert asked == [DEVICE, other]
    assert not warnings(caplog)


@pytest.mark.parametrize("error", [2e-2, float("nan"), float("inf"), RuntimeError("ptxas said no")])
def test_a_fused_product_that_does_not_work(monkeypatch, caplog, error):
    asked = []

    def check(device):
        asked.append(device)
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(available, "_hopper_self_check", check)
    for _ in range(3):
        assert not has_hopper_kernel(DEVICE)
    assert asked == [DEVICE]
    assert has_half_bits_kernel(DEVICE)
    (found,) = warnings(caplog)
    assert found.startswith("The fused wgmma product kernel ")
    assert "Another version of Triton or of the GPU's driver" in found
    assert f"(Triton 3.6.0, torch {torch.__version__})" in found


def test_nothing_is_checked_in_a_capture(monkeypatch, caplog):
    """Nor is it kept that the fused product is not used there; what is known is."""
    asked = []
    monkeypatch.setattr(available, "_hopper_self_check", lambda device: asked.append(device) or 3e-3)
    for capturing, works, count in ((True, False, 0), (False, True, 1), (True, True, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert has_hopper_kernel(DEVICE) == works
        assert len(asked) == count
    assert not warnings(caplog)


@pytest.mark.parametrize(("capability", "triton"), [((8, 0), "3.6.0"), ((10, 0), "3.6.0"), ((9, 0), "3.5.1")])
def test_no_fused_product_for_other_machines(monkeypatch, caplog, capability, triton):
    """It is not written for them, of which nothing is said."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(sys.modules["triton"], "__version__", triton)
    monkeypatch.setattr(available, "_hopper_self_check", lambda device: pytest.fail("asked"))
    assert not has_hopper_kernel(DEVICE)
    assert not warnings(caplog)


def test_threads_that_ask_for_the_fused_product_at_once(monkeypatch):
    asked = []

    def check(device):
        asked.append(device)
        time.sleep(0.05)
        return 3e-3

    monkeypatch.setattr(available, "_hopper_self_check", check)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(has_hopper_kernel, [DEVICE] * 4))
    assert asked == [DEVICE]


def test_products_that_kernels_are_checked_with_do_not_depend_on_defaults_of_torch():
    cpu = torch.device("cpu")
    _, x, expected = available._check_product(cpu, 2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            _, same, again = available._check_product(cpu, 2)
    finally:
        torch.set_default_dtype(before)
    assert same.dtype == torch.float32
    assert torch.equal(same, x)
    assert torch.equal(again, expected)
