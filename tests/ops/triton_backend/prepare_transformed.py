"""Compiles the preparation of transformed inputs for sm_90 and runs its PTX in an emulator.

What it writes is decoded and compared with the transform in float64; `test_compile.py` runs this.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from compile_for_gpu import NoDevice
from packed_weights import random_packed
from ptx_kernel import Kernel
from test_fragments import fixed_point
from test_half_bits import warpgroup_inputs
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from optimum_arb.format.hadamard import hadamard_transform, random_signs
from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton import half_bits, one_bit
from optimum_arb.ops.backends.triton.half_bits_inputs import CHUNK
from optimum_arb.ops.backends.triton.prepack import Prepacked, join, prepack

# columns, block, block size of the weight, permuted, tokens, parts
FAR = (192, 64, 128, False, 3, 1)  # whose rows lie 2^31 elements from the first to the last
QUICK = [(576, 256, 128, True, 1, 1), (512, 128, 128, False, 6, 2), (512, 256, 256, True, 13, 2), FAR]
MORE = [
    (64, 64, 64, True, 2, 1),
    (192, 128, 64, False, 3, 3),
    (192, 256, 128, True, 5, 1),
    (300, 64, 64, True, 9, 1),
    (320, 256, 64, False, 6, 2),
    (384, 256, -1, True, 4, 1),
    (395, 256, -1, False, 16, 1),
    (640, 16, 128, False, 2, 1),
    (1, 128, 128, False, 1, 1),
    (4304, 128, 128, True, 1, 1),
    (4304, 256, 64, False, 5, 1),
]
ROWS = 128  # of each part: a program's four warps stay within one


def expected_slots(x: torch.Tensor, weight: Prepacked, order, sign: torch.Tensor, block: int, parts: int) -> np.ndarray:
    """float64 `[parts * inputs, M, T, 128]`: the transformed and scaled numbers of the slots."""
    given = x.double() if order is None else x.double()[:, order[0].long()]
    changed = hadamard_transform(given * sign, block)
    index = torch.arange(weight.tiles * 128) if weight.index is None else weight.index.view(-1, weight.tiles * 128)[0]
    scaled = changed[:, index.long()] * weight.input_scale.double()[:, None]
    return scaled.view(len(weight.input_scale), len(x), weight.tiles, 128).numpy()


def check_one_bit(words: torch.Tensor, expected: np.ndarray) -> float:
    """The largest error in units of the fixed point."""
    found = words.numpy().view(np.uint32).reshape(*expected.shape[:-1], 32, 4)
    low, high, scale, _ = (np.ascontiguousarray(found[..., j]) for j in range(4))
    unit = scale.view(np.float32)[..., :1].astype(np.float64) / 2
    error = np.abs(fixed_point(low, high) * unit - expected) / np.maximum(unit, 1e-30)
    return float(error.max())


def check_half_bits(words: torch.Tensor, expected: np.ndarray, warpgroups: bool) -> float:
    """The largest error, relative to the largest number of its tile and token."""
    sources, tokens, tiles, _ = expected.shape
    slot = np.arange(128)
    bit = slot // 16
    if warpgroups:
        ordered, back, correction = warpgroup_inputs(words.numpy().reshape(sources, tiles, -1), -(-tokens // 8))
        ordered, back = ordered.astype(np.float64), back[:, :, 0, :, None].astype(np.float64)
        off = correction[:, :, 0] + (ordered * 2.0 ** (bit - 25)).sum(-1) * back[..., 0]
        assert (np.abs(off) <= 1e-5 * np.maximum(back[..., 0], 1e-30)).all()
        value = (ordered * 2.0 ** (bit - 14) * back / 2048).transpose(0, 2, 1, 3)
        return largest_error(value, expected)
    found = words.numpy().reshape(sources, tiles, -1, CHUNK)
    half = np.ascontiguousarray(found[..., :512]).view(np.float16).reshape(*found.shape[:3], 4, 8, 32)
    factors = np.ascontiguousarray(found[..., 512:]).view(np.float32).reshape(*found.shape[:3], 2, 4, 2, 2)
    assert (factors[..., 0, :] == factors[..., 1, :]).all()  # which are the same for two rows
    correction, back = (factors[..., i, :, 0, :].reshape(*found.shape[:3], 8).astype(np.float64) for i in (0, 1))
    r = slot // 4 % 4 * 8 + bit % 2 * 4 + slot % 2 * 2 + slot // 2 % 2
    ordered = half[..., bit // 2, :, r].astype(np.float64)  # slots first
    ordered = np.moveaxis(ordered, 0, -1)  # sources, tiles, token tiles, 8, 128
    assert np.abs(correction + (ordered * 2.0 ** (bit - 25)).sum(-1)).max() < 1e-5
    value = ordered * 2.0 ** (bit - 14) * back[..., None] / 2048
    return largest_error(value.transpose(0, 2, 3, 1, 4).reshape(sources, -1, tiles, 128), expected)


def largest_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Of `[sources, tokens, T, 128]`, relative to the largest number of its tile and token."""
    tokens = expected.shape[1]
    assert not value[:, tokens:].any(), "tokens that there are not"
    largest = np.maximum(np.abs(expected).max(-1, keepdims=True), 1e-30)
    return float((np.abs(value[:, :tokens] - expected) / largest).max())


def main() -> None:
    run = jit.JITFunction.run
    compiled = []

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if self.__name__.startswith("_prepare"):
            compiled.append((self.__name__, kernel, grid))
        return kernel

    jit.JITFunction.run = compile_only
    CompiledKernel.__getitem__ = lambda self, grid: lambda *args, **options: None
    driver.set_active(NoDevice())
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    one_bit.overlaps = half_bits.overlaps = half_bits.has_warpgroups = lambda device: True
    for case in MORE if "more" in sys.argv else QUICK:
        columns, block, block_size, permuted, tokens, parts = case
        layout = planes_layout(2 if columns < 600 else 1, col_scale=True)
        weights = [prepack(random_packed(layout, ROWS, columns, block_size, seed=seed)) for seed in range(parts)]
        weight = weights[0] if parts == 1 else join(weights)
        generator = torch.Generator().manual_seed(columns)
        order = torch.randperm(columns, generator=generator).to(torch.int16)[None] if permuted else None
        sign = random_signs(columns, 5).to(torch.int8) * 2 - 1
        apart = 2**31 // (tokens - 1) if case is FAR else columns + 16
        wide = torch.empty((tokens - 1) * apart + columns, dtype=torch.bfloat16)
        x = wide.as_strided((tokens, columns), (apart, 1))
        x.copy_(torch.randn(tokens, columns, generator=generator))
        expected = expected_slots(x, weight, order, sign, block, parts)
        configs = [(half_bits, half_bits.HalfConfig(4))]
        if tokens > 8:
            configs.append((half_bits, half_bits.HalfConfig(4, warpgroups=False)))
        if tokens <= one_bit.MAX_TOKENS:
            configs.append((one_bit, one_bit.DecodeConfig(warps=4)))
        for kind, config in configs:
            rows = (ROWS,) * parts
            plan = kind.Plan(x, weight, None, config, rows, *[None] * (kind is one_bit), (order, sign, block))
            plan.run(x, None)
            name, kernel, grid = compiled[-1]
            scratch = torch.full((plan.scratch,), -1, dtype=torch.int32)
            made, *_ = plan.arguments(wide, apart, scratch, None, None, None)
            kinds = kernel.src.signature.values()
            given = [arg for of, arg in zip(kinds, made, strict=True) if of != "constexpr"]
            Kernel(kernel.asm["ptx"], grid, kernel.metadata.num_warps, [*given, 0, 0])
            if kind is one_bit:
                error = check_one_bit(scratch, expected)
                assert error < 0.6, f"{name} {columns} {block}: {error} units"
            else:
                error = check_half_bits(scratch[: plan.added], expected, tokens > 8 and config.warpgroups)
                assert error < 6e-4, f"{name} {columns} {block}: {error}"
            print(f"{name} {columns} block {block}, weight {block_size}, {tokens} tokens, {parts} parts: {error:.2e}")


if __name__ == "__main__":
    main()
