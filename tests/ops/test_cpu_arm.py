"""The kernels for 64-bit Arm against the reference in float64, in QEMU's emulator.

They run with `-m slow` where `qemu-aarch64` is installed (Debian: qemu-user-static) and a compiler (of PyPI: ziglang).
"""

from __future__ import annotations

import pytest
import torch
from arm_emulated import EMULATOR, EmulatedLibrary, compiler
from packed_weights import random_packed, relative_error

from optimum_arb.format.layout import all_layouts
from optimum_arb.ops.backends import reference
from optimum_arb.ops.backends.cpu import lookup, native
from optimum_arb.ops.backends.cpu.plan import plan_for, prepare_columns, tiles_for

pytestmark = [
    pytest.mark.slow,  # the emulator takes its time
    pytest.mark.skipif(
        EMULATOR is None or compiler() is None, reason="needs qemu-aarch64, and ziglang or a gcc for aarch64"
    ),
]
LAYOUTS = {layout.name: layout for layout in all_layouts()}
KERNELS = ["portable", "neon", "dotprod"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = EmulatedLibrary(tmp_path_factory.mktemp("arm"))
    yield found
    found.close()


@pytest.fixture
def arm(library, monkeypatch) -> EmulatedLibrary:
    """The CPU backend's native kernels are those of the emulator."""
    monkeypatch.setattr(native, "load", lambda: library)
    monkeypatch.setattr(native, "kernels", lambda: library.kernels)
    return library


def check(arm: EmulatedLibrary, packed, m: int, dtype: torch.dtype, kernel: str) -> None:
    """The bounds of `test_cpu.check`."""
    x = torch.randn(m, packed.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(packed.out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference.linear(x.double(), packed, bias.double())
    size = x.double().abs() @ packed.unpack().dequantize(torch.float64).abs().T + bias.double().abs()
    arm.know(packed, x, bias)
    result = native.linear(x, packed, bias, kernel)
    half = torch.finfo(dtype).eps * expected.abs() + 5e-5 * size
    allowed = 1.5e-6 * size if dtype == torch.float32 else half
    assert ((result.double() - expected).abs() <= allowed).all()


def test_kernels_of_the_processor(library, tmp_path):
    assert list(library.kernels) == KERNELS
    without = EmulatedLibrary(tmp_path, "cortex-a53")  # which has no byte products
    assert list(without.kernels) == KERNELS[:2]
    without.close()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("columns", "block_size"), [(100, 128), (192, 64), (1096, 256), (430, -1), (4304, 128)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kernel(arm, name, columns, block_size, kernel):
    packed = random_packed(LAYOUTS[name], 19, columns, block_size, permuted=True)
    for m in (1, 7):
        check(arm, packed, m, torch.float32, kernel)
    check(arm, packed, 3, torch.bfloat16, kernel)
    check(arm, packed, 3, torch.float16, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("columns", "block_size"), [(192, 64), (430, -1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantized(arm, name, columns, block_size, kernel):
    packed = random_packed(LAYOUTS[name], 41, columns, block_size, permuted=True)
    plan, tiles = plan_for(name), tiles_for(columns, block_size, native.LANES)
    ones = prepare_columns(torch.ones(1, columns), packed, plan, tiles)
    plain = tiles_for(columns, block_size, tiles.width // 8)
    expected = lookup.dequantize(prepare_columns(torch.ones(1, columns), packed, plan, plain), packed, plan, plain)
    expected = plain.join(expected.view(41, tiles.count, -1, 8).transpose(-1, -2))
    arm.know(packed, ones)
    out = torch.empty(41, tiles.count, 8, native.LANES)
    weight = tiles.join(native.dequantize(ones, packed, tiles, out, kernel))
    assert relative_error(weight, expected) <= 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token_and_several_have_the_same_bits(arm, kernel):
    packed = random_packed(LAYOUTS["planes-2-col"], 43, 600)
    x = torch.randn(5, 600, generator=torch.Generator().manual_seed(2))
    arm.know(packed, x)
    together = native.linear(x, packed, None, kernel)
    for m in range(5):
        alone = x[m : m + 1].clone()
        arm.know(packed, alone)
        assert torch.equal(native.linear(alone, packed, None, kernel)[0], together[m])
