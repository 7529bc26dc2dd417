"""`launch.c` with a driver that launches nothing: what it is asked for, and that Triton asks for the same."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from optimum_arb.ops.backends.triton import native_launch, outputs
from optimum_arb.ops.backends.triton.launch import Ready
from optimum_arb.ops.backends.triton.native_launch import EXTRA, OUT, SCRATCH, NativeLaunches, Slot, Unexpected, X

HERE = Path(__file__)
SOURCE = Path(native_launch.__file__).with_name("launch.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and Linux")


class Record(ctypes.Structure):
    """`record_t` of fake_cuda.c."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("function", "stream")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint32) for name in ("shared", "attribute_count", "param_count")),
        ("attributes", ctypes.c_ubyte * (72 * 8)),
        ("params", ctypes.c_ubyte * 4096),
    )

    def attribute(self, index: int) -> tuple[int, ...]:
        return struct.unpack_from("=I4xIII", bytes(self.attributes), 72 * index)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the object and the driver."""
    folder = tmp_path_factory.mktemp("native")
    flags = ["-shared", "-fPIC", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(folder / "_launch.so"), "-ldl"], check=True)
    fake = [str(HERE.with_name("fake_cuda.c")), "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([COMPILER, *flags, *fake], check=True)
    return folder


@pytest.fixture
def driver(built):
    found = ctypes.CDLL(str(built / "libcuda.so.1"))
    found.fake_records.restype = ctypes.POINTER(Record)
    found.fake_reset()
    found.fake_error(0)
    found.fake_context(ctypes.c_uint64(1))
    found.fake_keeps_flags(1)
    return found


@pytest.fixture
def library(built, driver) -> ctypes.CDLL:
    return native_launch.open_library(built / "_launch.so", str(built / "libcuda.so.1"))


SIZES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "u64": 8}


def assembly(kinds) -> str:
    """The head of a kernel with these arguments."""
    sizes = []
    for kind in kinds:
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            sizes += ["8 d[128]", "32 d", "32 d", "64 d", "64 d"]
        elif kind != "constexpr":
            sizes.append(f"{8 * SIZES.get(kind, 8)} d")
    lines = (f"\t.param .{'align 64 .b' if '[' in size else 'u'}{size}" for size in [*sizes, "64 d", "64 d"])
    return ".visible .entry _kernel(\n" + ",\n".join(lines) + "\n)\n.reqntid 128\n{\n\tld.param.u64 %rd1, [d];\n"


def kernel(function: int, *kinds, maps=(), warps=4, clusters=1, shared=0, ptx=None, **metadata):
    """As much of what Triton compiles as is read."""
    of = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_pdl": False, "launch_cooperative_grid": False}
    return SimpleNamespace(
        function=function,
        packed_metadata=(warps, clusters, shared),
        metadata=SimpleNamespace(tensordesc_meta=list(maps), **{**of, **metadata}),
        src=SimpleNamespace(signature={f"a{i}": kind for i, kind in enumerate(kinds)}),
        asm={"ptx": assembly(kinds) if ptx is None else ptx},
    )


def expect(driver, function: int, *sizes: int) -> None:
    driver.fake_expect(ctypes.c_uint64(function), len(sizes), (ctypes.c_uint32 * len(sizes))(*sizes))


def records(driver) -> list[Record]:
    found = driver.fake_records()
    return [Record.from_buffer_copy(found[i]) for i in range(driver.fake_count())]


def test_parameters_and_addresses(library, driver):
    weight = torch.zeros(8)
    kinds = ("*fp16", "i32", "constexpr", "*fp32", "i64", "*fp16", "i8", "u64", "*fp32")
    args = (Slot(X), 7, 1, weight, -(2**40), Slot(OUT, 1024), -3, 2**63, None)
    first = Ready(kernel(3, *kinds, warps=8, shared=4096, launch_pdl=True), (5, 6, 7), args)
    second = Ready(kernel(4, "*i32", "*i32", "i16"), (2, 1, 1), (Slot(SCRATCH, 512), Slot(EXTRA), 9))
    expect(driver, 3, 8, 4, 8, 8, 8, 1, 8, 8, 8, 8)
    expect(driver, 4, 8, 8, 2, 8, 8)
    launches = NativeLaunches(library, [first, second], 0)
    for start in (4096, 2**45):
        driver.fake_reset()
        launches.run(99, start, start + 1, start + 2, start + 3)
        one, two = records(driver)
        assert (one.function, one.stream, one.shared, list(one.grid), list(one.block)) == (
            3,
            99,
            4096,
            [5, 6, 7],
            [256, 1, 1],
        )
        found = struct.unpack_from("=QiQqQbQQQQ", bytes(one.params))
        assert found == (start, 7, weight.data_ptr(), -(2**40), start + 1 + 1024, -3, 2**63, 0, 0, 0)
        assert (one.attribute_count, one.attribute(0)) == (1, (6, 1, 0, 0))
        assert (two.function, two.stream, two.shared, list(two.grid), list(two.block)) == (
            4,
            99,
            0,
            [2, 1, 1],
            [128, 1, 1],
        )
        assert struct.unpack_from("=QQhQQ", bytes(two.params)) == (start + 3 + 512, start + 2, 9, 0, 0)
        assert two.attribute_count == 0


def test_clusters_and_cooperation(library, driver):
    made = kernel(1, clusters=2, launch_pdl=True, launch_cooperative_grid=True)
    NativeLaunches(library, [Ready(made, (3, 2, 1), ())], 0).run(0, 0, 0, 0, 0)
    (record,) = records(driver)
    assert list(record.grid) == [6, 2, 1]
    found = [record.attribute(i) for i in range(record.attribute_count)]
    assert found == [(6, 1, 0, 0), (2, 1, 0, 0), (4, 2, 1, 1), (5, 1, 0, 0)]


def described(base, rows: int = 48) -> SimpleNamespace:
    return SimpleNamespace(base=base, shape=(rows, 256), strides=(512, 1), padding="zero")


META = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [16, 128], "fp4_padded": False}
DESCRIPTOR = "tensordesc<bf16[16, 128],NVMMASharedLayout()>"


@pytest.fixture
def made_by_triton(driver, monkeypatch):
    """What `fill_tma_descriptor` makes, by the driver of the tests."""

    def made(descriptor, meta: dict, address: int) -> bytes:
        (rows, columns), (stride, _) = descriptor.shape, descriptor.strides
        buffer = (ctypes.c_ubyte * 192)()
        start = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 64
        code = driver.cuTensorMapEncodeTiled(
            *(ctypes.c_void_p(start), 8, 2, ctypes.c_uint64(address), (ctypes.c_uint64 * 2)(columns, rows)),
            *((ctypes.c_uint64 * 1)(2 * stride), (ctypes.c_uint32 * 2)(*reversed(meta["block_size"]))),
            *((ctypes.c_uint32 * 2)(1, 1), 0, meta["swizzle"], 2, 0),
        )
        if code:
            raise Unexpected(f"error {code}")
        found = bytearray(ctypes.string_at(start, 128))
        found[10] &= ~32  # bit 21 of the second 64, as Triton 3.7 and later do
        return bytes(found)

    monkeypatch.setattr(native_launch, "_made_map", made)


@pytest.mark.usefixtures("made_by_triton")
def test_tensor_maps(library, driver):
    """That of the weight is made once, that of x gets an address at each run."""
    weight = torch.zeros(64, dtype=torch.int64)
    assert weight.data_ptr() % 16 == 0
    made = kernel(2, DESCRIPTOR, "i32", DESCRIPTOR, maps=[META, META])
    expect(driver, 2, 128, 4, 4, 8, 8, 4, 128, 4, 4, 8, 8, 8, 8)
    launches = NativeLaunches(library, [Ready(made, (1, 1, 1), (described(Slot(X, 32)), 5, described(weight)))], 0)
    for x in (2**20, 2**30):
        driver.fake_reset()
        launches.run(0, x, 0, 0, 0)
        assert driver.fake_replaced() == 1
        (record,) = records(driver)
        form = "=128siiqqi128siiqqQQ"
        mine, *of_x, theirs, rows, columns, stride, one, first, second = struct.unpack_from(form, bytes(record.params))
        assert of_x == [48, 256, 512, 1, 5]
        assert (rows, columns, stride, one, first, second) == (48, 256, 512, 1, 0, 0)
        for tensor_map, address in ((mine, x + 32), (theirs, weight.data_ptr())):
            # address, flags, sizes, strides, box, steps, type, rank, no interleave, swizzle, promotion, no fill
            found = struct.unpack_from("=2Q3Q2Q3I3I6I", tensor_map)
            assert found == (address, 0, 256, 48, 0, 1024, 0, 128, 16, 0, 1, 1, 0, 8, 2, 0, 3, 2, 0)
    with pytest.raises(RuntimeError, match=r"CUDA error 1 .*invalid argument"):
        launches.run(0, 2**20 + 1, 0, 0, 0)  # no map begins there


@pytest.mark.usefixtures("made_by_triton")
def test_maps_that_cannot_be_moved(library, driver):
    """A driver that changes more than the address, descriptors of other kinds, and addresses that it refuses."""
    weight = torch.zeros(64, dtype=torch.int64)

    def native(base, meta: dict | None = META, **fields) -> NativeLaunches:
        descriptor = SimpleNamespace(**{**vars(described(base)), **fields})
        ready = Ready(kernel(2, DESCRIPTOR, "*fp16", maps=[meta]), (1, 1, 1), (descriptor, weight))
        return NativeLaunches(library, [ready], 0)

    native(weight)
    for wrong in (
        {"meta": {**META, "fp4_padded": True}},
        {"meta": {**META, "is_im2col": True}},
        {"meta": None},
        {"round_f32_to_tf32": True},
        {"base": weight[1:]},
        {"base": Slot(X)},  # and no tensor whose address could stand for it
    ):
        with pytest.raises(Unexpected):
            native(**{"base": weight, **wrong})
    driver.fake_keeps_flags(0)
    with pytest.raises(Unexpected, match="moves no map"):
        native(weight)


def test_errors(library, driver):
    launches = NativeLaunches(library, [Ready(kernel(1), (1, 1, 1), ())], 0)
    driver.fake_error(700)
    with pytest.raises(RuntimeError, match=r"CUDA error 700 .*illegal memory access"):
        launches.run(0, 0, 0, 0, 0)
    driver.fake_error(0)
    launches.run(0, 0, 0, 0, 0)
    assert driver.fake_count() == 1


def test_thread_without_a_context(library, driver):
    driver.fake_context(ctypes.c_uint64(0))
    launches = NativeLaunches(library, [Ready(kernel(1), (1, 1, 1), ())], 3)
    for _ in range(2):
        launches.run(0, 0, 0, 0, 0)
    assert (driver.fake_contexts_set(), driver.fake_count()) == (1, 2)


def test_threads_share_a_plan(library, driver):
    """Each has its own addresses in all that it launches."""
    wrong: list[int] = []
    for _ in range(3):
        kinds = ["*fp16"] * 8
        expect(driver, 5, *[8] * 10)
        made = Ready(kernel(5, *kinds), (1, 1, 1), (Slot(X), Slot(OUT)) * 4)
        launches = NativeLaunches(library, [made], 0)
        driver.fake_reset()

        def work(number: int, launches: NativeLaunches = launches) -> None:
            for _ in range(8):
                launches.run(number, 1000 * number, 1000 * number + 8, 0, 0)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for record in records(driver):
            found = struct.unpack_from("=8Q", bytes(record.params))
            if found != (1000 * record.stream, 1000 * record.stream + 8) * 4:
                wrong.append(record.stream)
    assert not wrong


@pytest.mark.parametrize(
    "made",
    [
        kernel(1, "*fp16", "i32"),
        kernel(1, "fp32"),
        kernel(1, ("i32", "i32")),
        kernel(1, "nvTmaDesc"),
        kernel(1, "*fp16", global_scratch_size=64),
        kernel(1, "*fp16", profile_scratch_size=64),
        kernel(1, "*fp16", clusters=16),
        kernel(1, "tensordesc<fp16[16, 128]>"),
        kernel(1, "*fp16", maps=[{}]),
        kernel(1, "*fp16", instrumentation_mode="gsan"),
        kernel(1, "*fp16", shared=229 * 1024),
        kernel(1, "*fp16", ptx=assembly(["*fp16", "i32"])),
        kernel(1, "*fp16", ptx=assembly([])),
        kernel(1, "*fp16", ptx=""),
    ],
)
def test_unexpected_kernels(library, made):
    with pytest.raises(Unexpected):
        NativeLaunches(library, [Ready(made, (1, 1, 1), (Slot(X),))], 0)


def test_more_than_fits(library):
    for args in ((1,) * 70, (1,) * 900):
        with pytest.raises(Unexpected):
            NativeLaunches(library, [Ready(kernel(1, *["i64"] * len(args)), (1, 1, 1), args)], 0)
    whole = Ready(kernel(1, *["i64"] * 60), (1, 1, 1), (1,) * 60)
    with pytest.raises(Unexpected, match="bytes"):
        NativeLaunches(library, [whole] * 40, 0)
    with pytest.raises(Unexpected, match="grid"):
        NativeLaunches(library, [Ready(kernel(1), (1, 0, 1), ())], 0)


def test_where_it_is_not_to_be_had(library, built, monkeypatch, tmp_path):
    device = torch.device("cuda", 0)
    ready = Ready(kernel(1), (1, 1, 1), ())
    monkeypatch.setattr(native_launch, "load", lambda: library)
    assert native_launch.prepare([ready], device) is not None
    assert native_launch.prepare([ready, None], device) is None  # nothing was compiled
    assert native_launch.prepare([ready], torch.device("cpu")) is None
    assert native_launch.prepare([Ready(kernel(1, "fp64"), (1, 1, 1), (1.0,))], device) is None
    monkeypatch.setattr(native_launch, "load", lambda: None)
    assert native_launch.prepare([ready], device) is None
    monkeypatch.undo()
    with pytest.raises(OSError, match="no-driver"):
        native_launch.open_library(built / "_launch.so", "/no-driver.so")
    load = native_launch.load.__wrapped__
    monkeypatch.setattr(native_launch, "__file__", str(tmp_path / "native_launch.py"))
    assert load(str(built / "libcuda.so.1")) is None  # not built
    shutil.copy(built / "_launch.so", tmp_path / f"_launch{native_launch.importlib.machinery.EXTENSION_SUFFIXES[0]}")
    assert (load(str(built / "libcuda.so.1")) is None) == (not native_launch.DIRECT)
    assert load("/no-driver.so") is None
    monkeypatch.setattr(native_launch, "DIRECT", False)
    assert load(str(built / "libcuda.so.1")) is None


def test_results_of_every_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(
        outputs,
        "_empty",
        lambda *args: asked.append(args) or torch.empty_strided(args[0], args[1], dtype=args[2]),
    )
    results = outputs.Outputs(6, torch.float16)
    for shape in ((8,), (3, 8), (2, 3, 8), (2, 1, 3, 8)):
        for _ in range(2):
            made = results.empty(torch.Size(shape))
            assert made.shape == (*shape[:-1], 6)
            assert made.stride() == torch.empty(made.shape).stride()
            assert made.dtype == torch.float16
            assert results.arguments(torch.Size(shape)) == (made.shape, made.stride(), torch.float16)
    for count in range(1, 100):
        assert results.empty(torch.Size((count, 8))).shape == (count, 6)
    assert len(results._known) <= outputs.MOST_SHAPES
    assert asked[-1] == ((99, 6), (6, 1), torch.float16)


BACKEND = Path(triton.__file__).parent / "backends" / "nvidia"


@pytest.mark.slow
@pytest.mark.skipif(not native_launch.DIRECT or not (BACKEND / "bin" / "ptxas").exists(), reason="not for this Triton")
def test_triton_asks_for_the_same(built, tmp_path):
    """All launches of real kernels, byte by byte."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[3]), str(HERE.parents[2]), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": str(built),
        "TRITON_LIBCUDA_PATH": str(built),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, str(HERE.with_name("launch_natively.py")), str(built)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("launches") == 32, done.stdout
    assert "group written" in done.stdout
