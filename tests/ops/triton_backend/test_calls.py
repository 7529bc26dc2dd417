"""`calls.c` with launches that are made up: what it hands to them, and when it leaves a call to Python."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from optimum_arb.ops.backends.triton import available

SOURCE = Path(available.__file__).with_name("calls.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
HEADERS = Path(sysconfig.get_paths()["include"])
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux" or not (HEADERS / "Python.h").exists(),
    reason="needs a C compiler, Python's headers and Linux",
)
Launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64))
NUMBER = -1  # of the device, as tensors on the CPU say it


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("calls") / f"_calls{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-shared", "-fPIC", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location("_calls", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Product:
    """Calls of a layer with what they ask for."""

    def __init__(self, module):
        self.launched: list[tuple[int, int, list[int]]] = []
        self.allocated: list[torch.Tensor] = []
        self.code, self.hooked, self.device = 0, False, NUMBER
        self.tensors = {"weight": torch.zeros(8), "scale": torch.zeros(4), "bias": None}

        def launch(plan, stream, addresses):
            self.launched.append((plan, stream, [addresses[i] for i in range(6)]))
            return self.code

        self.function = Launch(launch)
        self.calls = module.Calls(
            torch.Tensor,
            tuple((self.tensors, key, tensor) for key, tensor in self.tensors.items()),
            lambda: self.device,
            lambda device: 77 if device == NUMBER else 1,
            self.empty,
            lambda: self.hooked,
            ctypes.cast(self.function, ctypes.c_void_p).value,
        )

    def empty(self, sizes, strides, dtype) -> torch.Tensor:
        made = torch.empty_strided(sizes, strides, dtype=dtype)
        self.allocated.append(made)
        return made

    def fail(self, code: int) -> None:
        raise RuntimeError(f"CUDA error {code}")

    def add(self, *shape: int, results=((6,),), scratch=None, written=(), one=True, extra=0) -> None:
        allocations = tuple(((*shape[:-1], *rows), (rows[-1], 1)[-len(shape) :], torch.float16) for rows in results)
        size = torch.Size(shape)
        self.calls.add(size, torch.float16, NUMBER, self, 4096, extra, allocations, scratch, written, one)


@pytest.fixture
def product(module) -> Product:
    found = Product(module)
    found.add(5, 16)
    return found


X = torch.zeros(5, 16, dtype=torch.float16)


def test_one_result(product):
    out = product.calls(X)
    assert type(out) is torch.Tensor
    assert (out.shape, out.dtype) == ((5, 6), torch.float16)
    assert product.launched == [(4096, 77, [X.data_ptr(), out.data_ptr(), 0, 0, 0, 0])]


def test_several_results_and_scratch_memory(product):
    product.add(3, 16, results=((6,), (2,), (4,)), scratch=((100,), (1,), torch.uint8), one=False, extra=2**40)
    x = X[:3]
    out = product.calls(x)
    assert [tuple(each.shape) for each in out] == [(3, 6), (3, 2), (3, 4)]
    *results, scratch = product.allocated
    assert all(one is other for one, other in zip(out, results, strict=True))
    assert (scratch.shape, scratch.dtype) == ((100,), torch.uint8)
    first, second, third = (each.data_ptr() for each in out)
    addresses = [x.data_ptr(), first, 2**40, scratch.data_ptr(), second, third]
    assert product.launched == [(4096, 77, addresses)]


def test_inputs_that_python_has_to_look_at(product):
    def left(x) -> bool:
        return product.calls(x) is None and not product.launched and not product.allocated

    assert left(X[:4])  # nothing is ready for that shape
    assert left(X.view(1, 5, 16))
    assert left(X.bfloat16())
    assert left(torch.zeros(16, 5, dtype=torch.float16).T)
    assert left(torch.zeros(81, dtype=torch.float16)[1:].view(5, 16))
    assert left(nn.Parameter(X, requires_grad=False))
    assert left(3)
    product.hooked = True
    assert left(X)
    product.hooked, product.device = False, 0
    assert left(X)
    product.device = NUMBER
    assert product.calls(X) is not None


def test_tensors_that_changed(product):
    first = product.tensors["weight"]
    product.tensors["weight"] = first.clone()
    assert product.calls(X) is None
    product.tensors["weight"] = first
    assert product.calls(X) is not None
    kept, first.data = first.data, first.clone()
    assert product.calls(X) is None
    first.data = kept
    assert product.calls(X) is not None
    first.add_(1)  # where it is
    assert product.calls(X) is not None
    product.tensors["bias"] = torch.zeros(6)
    assert product.calls(X) is None
    product.tensors["bias"] = None
    del product.tensors["scale"]
    assert product.calls(X) is None


def test_tensors_that_were_written(product):
    scale, order = torch.zeros(4), torch.zeros(4)
    product.add(5, 16, written=(scale, scale._version, order, order._version))
    assert product.calls(X) is not None
    order.add_(1)
    assert product.calls(X) is None
    product.add(5, 16, written=(scale, scale._version, order, order._version))  # made ready again
    assert product.calls(X) is not None
    scale.add_(1)
    assert product.calls(X) is None


def test_errors(product):
    product.code = 700
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        product.calls(X)
    product.code = 0

    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    again = type(product.calls)(torch.Tensor, (), lambda: NUMBER, lambda d: 0, full, lambda: False, 0)
    size = torch.Size((5, 16))
    again.add(size, torch.float16, NUMBER, product, 0, 0, (((1,), (1,), torch.float16),), None, (), True)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        again(X)
    with pytest.raises(TypeError):
        product.calls(X, X)
    with pytest.raises(TypeError):
        product.calls(x=X)
    with pytest.raises(TypeError):
        type(product.calls)(torch.Tensor, [], 1, 1, 1, 1, 0)
    with pytest.raises(TypeError, match="tuples"):
        again.add(size, torch.float16, NUMBER, product, 0, 0, (1,), None, (), True)
    with pytest.raises(TypeError, match="tuples"):
        again.add(size, torch.float16, NUMBER, product, 0, 0, (), None, (), True)


def test_nothing_is_leaked(module):
    """Neither what a call makes nor what the calls hold."""
    product = Product(module)
    scale = torch.zeros(4)
    for _ in range(3):
        product.add(5, 16, written=(scale, 0), scratch=((8,), (1,), torch.uint8))
    counts = [
        sys.getrefcount(each) for each in (X, product, torch.float16, *product.tensors.values()) if each is not None
    ]
    for _ in range(50):
        result = product.calls(X)
        product.tensors["bias"] = scale
        assert product.calls(X) is None
        product.tensors["bias"] = None
    product.code = 1
    for _ in range(50):
        with pytest.raises(RuntimeError):
            product.calls(X)
    made = [weakref.ref(each) for each in product.allocated]
    product.allocated.clear()
    assert [end() is None for end in made].count(False) == 1  # the last result
    del result
    assert [
        sys.getrefcount(each) for each in (X, product, torch.float16, *product.tensors.values()) if each is not None
    ] == counts
    ends = [weakref.ref(product.tensors["weight"]), weakref.ref(product)]
    gc.disable()
    try:
        product.calls = None
        product.tensors.clear()
        product.function = None
        assert ends[0]() is None
        del product
        gc.collect()  # its own methods and functions are a cycle
        assert ends[1]() is None
    finally:
        gc.enable()


def test_threads(product):
    """The launches run beside each other; nobody gets another one's result."""
    inputs = [X.clone() for _ in range(4)]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        results[index] += [product.calls(inputs[index]) for _ in range(200)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = {(addresses[0], addresses[1]) for _, _, addresses in product.launched}
    assert len(pairs) == 800
    assert pairs == {(x.data_ptr(), out.data_ptr()) for x, of in zip(inputs, results, strict=True) for out in of}
