"""Compares what launch.c asks of the driver with what Triton asks; `test_native_launch.py` runs this.

In a process of its own, with a driver that only keeps what it is asked for. All kernels are compiled for sm_90, and the
sizes of their parameters are those of the assembly, so that nothing here knows how Triton passes arguments.
"""

import ctypes
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from packed_weights import random_packed
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel
from triton.runtime import driver

from optimum_arb.format.layout import layout_from_name
from optimum_arb.ops.backends.triton import (
    columns,
    digits,
    few_tokens_plan,
    hadamard,
    half_bits,
    hopper_group,
    hopper_plan,
    hopper_product,
    native_launch,
    one_bit,
    outputs,
    ready_launches,
    sums,
)
from optimum_arb.ops.backends.triton import hopper as hopper_file
from optimum_arb.ops.backends.triton import launch as launch_file
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig
from optimum_arb.ops.backends.triton.prepack import join, prepack

DEVICE = torch.device("cuda", 0)
try:
    from optimum_arb.ops.backends.triton._calls import Calls as CALLS
except ImportError:  # not built
    CALLS = None
FUNCTION = 0  # of launch.c


class Record(ctypes.Structure):
    """`record_t` of fake_cuda.c."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("function", "stream")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint32) for name in ("shared", "attribute_count", "param_count")),
        ("attributes", ctypes.c_char * (72 * 8)),
        ("params", ctypes.c_ubyte * 4096),
    )


def start(folder: Path) -> ctypes.CDLL:
    """Triton and the package with the driver in this folder."""
    fake = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    fake.fake_records.restype = ctypes.POINTER(Record)
    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device=None: 77
    active.get_device_capability = lambda device=None: (9, 0)
    active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    driver.set_active(active)
    library = native_launch.open_library(folder / "_launch.so", "libcuda.so.1")
    native_launch.load = lambda: library
    global FUNCTION
    FUNCTION = ctypes.cast(library.arb_launch_at, ctypes.c_void_p).value
    outputs._empty = lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    for module in (hopper_group, few_tokens_plan, ready_launches):
        module.current_stream = lambda device: 77
    for module in (launch_file, columns, sums, half_bits, hadamard, digits, one_bit):
        module.overlaps = lambda device: True
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    torch.cuda.is_current_stream_capturing = lambda: False
    converted: dict = {}  # kept on a GPU alone
    hopper_file.column_scales = hopper_product.column_scales = lambda scale, dtype: converted.setdefault(
        (id(scale), scale._version, dtype), columns.column_scales(scale, dtype)
    )
    loaded = CompiledKernel._init_handles

    def init_handles(kernel):
        if kernel.module is None:
            loaded(kernel)
            sizes = native_launch.parameter_sizes(kernel.asm["ptx"])
            assert sizes
            fake.fake_expect(ctypes.c_uint64(kernel.function), len(sizes), (ctypes.c_uint32 * len(sizes))(*sizes))

    CompiledKernel._init_handles = init_handles
    return fake


def recorded(fake: ctypes.CDLL) -> list[bytes]:
    records = fake.fake_records()
    found = [bytes(records[i]) for i in range(fake.fake_count())]
    fake.fake_reset()
    return found


def compare(fake: ctypes.CDLL, name: str, plan, x, bias, out, scratch, by_triton) -> None:
    """Lets the native launches and Triton's use the same memory and compares what reaches the driver."""
    fake.fake_reset()
    by_triton()
    expected = recorded(fake)
    memory = [scratch, out] if hasattr(plan, "grids") else [out, scratch]
    outputs._empty = lambda shape, strides, dtype: memory.pop(0).view(shape)
    plan.run(x, bias)
    found = recorded(fake)
    assert plan.native is not None, name
    assert len(found) == len(expected) == len(plan.native._owners), f"{name}: {len(found)}, {len(expected)} launches"
    for one, other in zip(found, expected, strict=True):
        assert one == other, f"{name}: {describe(one)}\n{describe(other)}"
    print(f"{name}: {len(found)} launches, {sum(Record.from_buffer_copy(r).attribute_count for r in found)} attributes")


def describe(record: bytes) -> str:
    of = Record.from_buffer_copy(record)
    values = [(field, getattr(of, field)) for field, _ in Record._fields_]
    return " ".join(f"{k}={v if isinstance(v, int) else bytes(v).rstrip(bytes(1)).hex()}" for k, v in values)


def hopper(fake: ctypes.CDLL, name: str, tokens: int, permuted: bool, with_bias: bool, dtype, config) -> None:
    packed = random_packed(layout_from_name(name), 272, 512, permuted=permuted)
    x, bias = torch.zeros(tokens, 512, dtype=dtype), torch.zeros(272, dtype=dtype) if with_bias else None
    plan = hopper_plan.HopperPlan(packed, tokens, 512, (dtype, True), dtype, bias, DEVICE, config.split_k, config)
    plan.run(x, bias)  # by Triton
    out = torch.zeros(tokens, 272, dtype=dtype)
    scratch = torch.zeros(max(plan.scratch, 1), dtype=torch.uint8)

    def by_triton():
        for launch, args in plan.launches(x, bias, out, ready_launches.memory_of(scratch)):
            launch(args)

    compare(fake, f"hopper {name} {tokens} {dtype} {config}", plan, x, bias, out, scratch, by_triton)
    if plan.product.pieces[0].multiply.col_scale is not None and dtype == torch.bfloat16:
        before = plan.native
        packed.col_scale.mul_(2)
        for _ in range(2):
            outputs._empty = lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
            plan.run(x, bias)
        assert plan.native is not before, "the converted column scales are those of before"


def natively(fake: ctypes.CDLL, plan, memory: list[torch.Tensor], *args) -> list[bytes]:
    """What one native run in this memory asks the driver for; the plan has run by Triton before."""
    assert plan.native_now() is not None
    fake.fake_reset()
    outputs._empty = lambda shape, strides, dtype: memory.pop(0).flatten()[: math.prod(shape)].view(shape)
    again = [*memory]
    plan.run(*args)
    assert not memory
    found = recorded(fake)
    if CALLS is not None:
        memory += again
        entry = plan.entry(args[0].shape, *args[1:])._replace(device=-1)  # as tensors on the CPU have it
        empty = outputs._empty
        calls = CALLS(torch.Tensor, (), lambda: -1, lambda _: 77, empty, lambda: False, FUNCTION)
        calls.add(*entry)
        assert calls(args[0]) is not None
        assert not memory
        assert recorded(fake) == found, "calls.c asks for something else"
    return found


def fresh(shape, strides, dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


def group(fake: ctypes.CDLL, title, weights, with_bias, dtype, tokens, config, gathers, sums, block: int = 0) -> None:
    """The products of one input ask for what Triton asks for in the same memory.

    `gathers` are how many copies of x each launch makes that does so, `sums` how many results each adds up.
    """
    columns_of_x = weights[0].in_features
    x = torch.zeros(tokens, columns_of_x, dtype=dtype)
    kind, counts = (dtype, True), [packed.out_features for packed in weights]
    biases = [torch.zeros(count, dtype=dtype) if with_bias else None for count in counts]
    transform = None
    if block:
        sign = torch.ones(columns_of_x, dtype=torch.int8)
        order = torch.arange(columns_of_x, dtype=torch.int16).view(1, -1)
        transform = hadamard.Transform(order, sign, block, tokens, columns_of_x, columns_of_x, kind, DEVICE)
    splits = [config.split_k] * len(weights)
    configs = [config] * len(weights)
    joined = hopper_group.HopperGroup(weights, biases, tokens, dtype, DEVICE, splits, configs, transform)
    scratch = torch.zeros(max(joined.scratch, 1), dtype=torch.uint8)
    outs = [torch.zeros(tokens, count, dtype=dtype) for count in counts]
    outputs._empty = fresh
    joined.run(x)  # by Triton
    fake.fake_reset()
    steps = joined.launches(x, outs, ready_launches.memory_of(scratch))
    for launch, args in steps:
        launch(args)
    expected = recorded(fake)
    pieces = sum(len(product.pieces) for product in joined.products)
    assert len(steps) == pieces + len(gathers) + len(sums) + (transform is not None), title
    assert [len(copy.weights) for copy in joined.copies if copy.gather is not None] == gathers, title
    assert [len(of) for _, of in joined._sums.values()] == sums, title
    found = natively(fake, joined, [*outs, *[scratch][: bool(joined.scratch)]], x)
    assert len(found) == len(expected), f"{title}: {len(found)}, {len(expected)} launches"
    for one, other in zip(found, expected, strict=True):
        assert one == other, f"{title}: {describe(one)}\n{describe(other)}"
    print(f"group {title}: {len(found)} launches")


def groups(fake: ctypes.CDLL) -> None:
    small, split = GemmConfig("hopper", 32, 64, 4, 3, 1), GemmConfig("hopper", 32, 64, 4, 3, 2)
    two, one = layout_from_name("planes-2-col"), layout_from_name("planes-1-col")

    def weights(layout, *rows: int, **choices):
        return [random_packed(layout, count, 512, seed=seed, **choices) for seed, count in enumerate(rows)]

    group(fake, "plain", weights(two, 272, 42), True, torch.float16, 64, small, [], [])
    group(fake, "split", weights(two, 160, 32, 7), True, torch.bfloat16, 33, split, [], [3])
    group(fake, "each its order", weights(two, 160, 32, 7, permuted=True), False, torch.float16, 64, split, [3], [3])
    same = weights(two, 160, 32, 7, permuted=True)
    for packed in same[1:]:
        packed.permutation = same[0].permutation.clone()
    group(fake, "one order", same, False, torch.float16, 64, split, [1], [3])
    scaled = weights(one, 160, 32, permuted=True)
    scaled[1].permutation = scaled[0].permutation
    group(fake, "scaled", scaled, False, torch.float16, 33, small, [2], [])
    before = replace(split, scale_input=True)
    group(fake, "scaled alone", weights(one, 160, 32), True, torch.bfloat16, 64, before, [2], [2])
    last_rows = replace(split, split_from=64)
    group(fake, "split from a row on", weights(two, 160, 32, 7), True, torch.bfloat16, 64, last_rows, [], [1])
    # of each: rows before, rows from there on; before them x scaled for all, behind them the sums
    four = replace(last_rows, scale_input=True)
    scaled_split = weights(one, 160, 160, 160)
    group(fake, "scaled and split from a row on", scaled_split, True, torch.bfloat16, 64, four, [3], [3])
    together, hopper_group.TOGETHER = hopper_group.TOGETHER, 0
    group(fake, "one after another", scaled_split, True, torch.bfloat16, 64, four, [1] * 3, [1] * 3)
    hopper_group.TOGETHER = together
    group(fake, "scaled for each plane", weights(two, 160, 32, 7), True, torch.bfloat16, 33, before, [3], [3])
    ordered = weights(two, 160, 32, permuted=True)
    group(fake, "ordered and scaled", ordered, False, torch.float16, 64, before, [2], [2])
    plain = layout_from_name("planes-2")
    mixed = [*weights(two, 160), *weights(plain, 42), *weights(one, 32)]
    group(fake, "two of three scaled", mixed, False, torch.bfloat16, 64, replace(small, scale_input=True), [2], [])
    group(fake, "transformed and scaled", weights(one, 160, 32), True, torch.float16, 64, before, [2], [2], block=128)
    some = [*weights(plain, 42), *weights(two, 160)]
    alone = replace(small, scale_input=True)
    group(fake, "transformed, one scaled", some, True, torch.bfloat16, 64, alone, [1], [], block=128)
    group(fake, "transformed", weights(two, 160, 32, 7), True, torch.float16, 64, split, [], [3], block=128)
    hopper_product.BESIDE = True
    group(fake, "beside each other", scaled_split, True, torch.bfloat16, 64, four, [3], [3])
    hopper_product.BESIDE = False
    written(fake, same, small)


def written(fake: ctypes.CDLL, weights, config) -> None:
    """Orders of columns and scales that were written after the launches were made ready."""
    x = torch.zeros(64, 512, dtype=torch.bfloat16)
    joined = hopper_group.HopperGroup(
        weights, [None] * 3, 64, torch.bfloat16, DEVICE, [1] * 3, [config] * 3, None
    )  # fmt: skip
    outputs._empty = fresh
    counts = []
    for change in (None, weights[1].permutation, weights[2].col_scale):
        if change is not None:
            change.copy_(change.flip(-1))
        before = joined.native
        for _ in range(3):
            fake.fake_reset()
            joined.run(x)
        assert joined.native is not None
        assert joined.native is not before, "the native launches are those of before"
        counts.append(fake.fake_count())
    assert counts == [4, 4, 4], counts
    print("group written")


def few(
    fake: ctypes.CDLL, kind, config, name: str, tokens: int, rows: tuple[int, ...], with_bias: bool, block: int = 0
) -> None:
    x = torch.zeros(tokens, 320, dtype=torch.bfloat16)
    parts = [prepack(random_packed(layout_from_name(name), count, 320, permuted=True)) for count in rows]
    weight = parts[0] if len(parts) == 1 else join(parts)
    bias = torch.zeros(sum(rows), dtype=torch.bfloat16) if with_bias else None
    transform = None
    if block:
        sign, order = torch.ones(320, dtype=torch.int8), torch.arange(320, dtype=torch.int16)[None]
        transform = (order if with_bias else None, sign, block)
    plan = kind.Plan(x, weight, bias, config, rows, *[None] * (kind is one_bit), transform)
    plan.device = DEVICE
    if getattr(plan, "sum", None) is not None:
        plan.sum.launch._device = DEVICE
    plan.run(x, bias)
    out, scratch = torch.zeros(plan.results, dtype=x.dtype), torch.zeros(plan.scratch, dtype=torch.int32)

    def by_triton():
        first, second, *third = plan.arguments(x, 320, scratch, bias, None, out)
        for program, grid, args in zip(plan.launches, plan.grids(), (first, second), strict=True):
            program(grid, args, 77)
        if third:
            plan.sum.launch(third[0])

    compare(fake, f"{kind.__name__} {name} {tokens} {rows} {block}", plan, x, bias, out, scratch, by_triton)


def of_digits(fake: ctypes.CDLL, name: str, tokens: int, with_bias: bool, dtype, config) -> None:
    packed = random_packed(layout_from_name(name), 272, 512, permuted=with_bias)
    x, bias = torch.zeros(tokens, 512, dtype=dtype), torch.zeros(272, dtype=dtype) if with_bias else None
    plan = digits.DigitsPlan(packed, tokens, 512, (dtype, True), dtype, bias, DEVICE, config)
    plan.run(x, bias)  # by Triton
    out, scratch = torch.zeros(tokens, 272, dtype=dtype), torch.zeros(plan.scratch, dtype=torch.uint8)
    stored = scratch[: plan.digits].view(torch.int8)
    steps = scratch[plan.steps_at :][: 4 * plan.steps].view(torch.float32)

    def by_triton():
        plan.prepare(plan.prepare_arguments(x, stored, steps))
        if plan.sum is None:
            plan.multiply(plan.multiply_arguments(stored, steps, bias, out))
        else:
            parts = scratch[plan.parts_at :].view(torch.float32)
            plan.multiply(plan.multiply_arguments(stored, steps, None, parts))
            plan.sum((parts, bias, out))

    compare(fake, f"digits {name} {tokens} {dtype} {config}", plan, x, bias, out, scratch, by_triton)
    assert natively(fake, plan, [out, scratch], x, bias)


def main() -> None:
    fake = start(Path(sys.argv[1]))
    hopper(fake, "planes-1-col", 16, True, True, torch.float16, GemmConfig("hopper", 16, 64, 4, 3, 2, 2))
    hopper(fake, "planes-2-col", 64, False, True, torch.bfloat16, GemmConfig("hopper", 64, 64, 4, 2, 1))
    hopper(fake, "planes-1-col", 64, False, True, torch.bfloat16, GemmConfig("hopper", 64, 64, 4, 2, 2, 1, True))
    hopper(fake, "planes-2-col", 16, False, True, torch.bfloat16, GemmConfig("hopper", 16, 64, 4, 3, 8, 1, True))
    hopper(fake, "planes-2-col", 64, True, False, torch.float16, GemmConfig("hopper", 64, 128, 8, 3, 1, 2, True))
    hopper(fake, "planes-3-mean", 64, True, False, torch.float16, GemmConfig("hopper", 32, 128, 8, 3, 1, 2))
    of_last_rows = GemmConfig("hopper", 64, 64, 4, 2, 3, 1, True, 192)
    hopper(fake, "planes-1-col", 64, False, True, torch.bfloat16, of_last_rows)
    hopper(fake, "planes-2-col", 33, True, False, torch.float16, of_last_rows)
    groups(fake)
    few(fake, one_bit, one_bit.DecodeConfig(), "planes-2-col", 1, (272,), True)
    few(fake, one_bit, one_bit.DecodeConfig(), "planes-1", 2, (42, 7, 64), False)
    few(fake, half_bits, half_bits.HalfConfig(), "planes-2-col", 16, (42, 64), True)
    few(fake, half_bits, half_bits.HalfConfig(4, 1, 1), "planes-2-col", 16, (42, 64), True)  # and a sum of three slices
    few(fake, one_bit, one_bit.DecodeConfig(), "planes-2-col", 4, (42, 7, 64), True, block=256)
    few(fake, half_bits, half_bits.HalfConfig(), "planes-1", 5, (272,), False, block=128)
    of_digits(fake, "planes-2-col", 1, True, torch.bfloat16, GemmConfig("digits", 1, 64, 4, 3, 2, 4))
    of_digits(fake, "planes-1", 16, False, torch.float16, GemmConfig("digits", 16, 64, 4, 3, 1, 2))


if __name__ == "__main__":
    main()
