"""Launches of a product by one call of `launch.c`, where that was built: no argument is looked at again in Python.

What Triton's own launcher makes of a compiled kernel's arguments is made once, as `driver.py` and `driver.c` in
`triton/backends/nvidia` of the releases in `launch.DIRECT` do it. A run fills in a few addresses. Maps of the copy
engine are made by Triton itself, and the parameters have to be those that the kernel's assembly declares.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import re
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
import triton

from .launch import DIRECT, Ready

# What CUDA's header calls the attributes of a launch
_COOPERATIVE, _CLUSTER, _CLUSTER_POLICY, _OVERLAPPED = 2, 4, 5, 6
_SPREAD = 1
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_MOST_SHARED = 228 * 1024  # beyond, Triton 3.8 and later launch with an attribute more
_INTEGERS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
_INTEGERS["u64"] = "Q"
_DECLARED = re.compile(r"^\s*\.param(?: \.align \d+)? \.[usbf](\d+)\b.*?(?:\[(\d+)\])?,?$", re.MULTILINE)


class Slot(NamedTuple):
    """The place of an address that is known at a run.

    Attributes:
        address: which one of `NativeLaunches.run`: X, OUT, EXTRA or SCRATCH; of `run_group` also SECOND and THIRD.
        offset: bytes from there.
    """

    address: int
    offset: int = 0


X, OUT, EXTRA, SCRATCH, SECOND, THIRD = range(6)
RESULTS = (OUT, SECOND, THIRD)  # of a group


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("words", ctypes.c_uint32 * 3))


class _Launch(ctypes.Structure):
    """`launch_t` of launch.c, field by field, and so the others."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared", "first_param", "param_count", "attribute_count")),
        ("attributes", _Attribute * 4),
    )


class _Patch(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("at", "address", "is_map", "unused")),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("block", "params", "launches", "patches")),
        *((name, ctypes.c_uint32) for name in ("block_size", "launch_count", "patch_count")),
        ("device", ctypes.c_int32),
    )


class Unexpected(Exception):
    """A kernel has something that this file does not know: Triton's own launcher has to be used."""


@lru_cache(maxsize=1)
def load(driver: str = "libcuda.so.1") -> ctypes.CDLL | None:
    """The built object with the driver's library opened; None where one of them is missing or Triton is another."""
    if not DIRECT:
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_launch" + suffix)
        if path.exists():
            try:
                return open_library(path, driver)
            except (OSError, AttributeError):  # no library, or one of another version of this package
                return None
    return None


def open_library(path: Path, driver: str) -> ctypes.CDLL:
    """The object at this path, with this library of the driver.

    Raises:
        OSError: it cannot be loaded, or there is no such driver.
        AttributeError: it lacks a function.
    """
    library = ctypes.CDLL(str(path))
    library.arb_launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint64] * 4)
    library.arb_launch.restype = ctypes.c_int
    library.arb_launch_group.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint64] * 5)
    library.arb_launch_group.restype = ctypes.c_int
    library.arb_launch_at.restype = ctypes.c_int  # which `_calls` calls
    words = ctypes.POINTER(ctypes.c_uint32)
    library.arb_move_map.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.arb_move_map.restype = ctypes.c_int
    library.arb_error.argtypes = (ctypes.c_int,)
    library.arb_error.restype = ctypes.c_char_p
    library.arb_limits.argtypes = (words, words, words)
    library.arb_limits.restype = None
    library.arb_open.argtypes = (ctypes.c_char_p,)
    if library.arb_open(driver.encode()):
        raise OSError(f"{driver} cannot be opened, or lacks what {path.name} needs of it.")
    return library


def prepare(launches: Sequence[Ready | None], device: torch.device) -> NativeLaunches | None:
    """Launches made ready, or None where Triton's own launcher is to be used.

    Args:
        launches: in their order; a `Slot` among the arguments for a tensor that changes. None for an unknown one.
        device: of all tensors; the current one.
    """
    library = load()
    ready = [launch for launch in launches if launch is not None]
    if library is None or device.type != "cuda" or len(ready) < len(launches):
        return None
    try:
        return NativeLaunches(library, ready, device.index)
    except Unexpected:
        return None


class NativeLaunches:
    """Launches of which all but a few addresses is known. Threads may share them.

    Args:
        library: what `load` returned.
        launches: in their order.
        device: the number of the GPU.

    Raises:
        Unexpected: a kernel needs what is not provided here.
    """

    def __init__(self, library: ctypes.CDLL, launches: Sequence[Ready], device: int):
        limits = [ctypes.c_uint32() for _ in range(3)]
        library.arb_limits(*limits)
        most_bytes, most_params, most_attributes = (limit.value for limit in limits)
        self._owners = [*launches]  # modules and tensors live as long
        self._library = library
        block = bytearray()
        params: list[int] = []
        patches: list[_Patch] = []
        described = []
        for launch in launches:
            first = len(params)
            _add_parameters(library, launch, block, params, patches)
            attributes = _attributes(launch.made)
            if len(params) - first > most_params or len(attributes) > most_attributes:
                raise Unexpected(f"{len(params) - first} parameters, {len(attributes)} attributes")
            described.append(_launch(launch, attributes, first, len(params) - first))
        if len(block) > most_bytes:
            raise Unexpected(f"{len(block)} bytes of parameters")
        # a ctypes array of the maps' alignment is not to be had: launch.c copies the block to where it is aligned
        self._arrays = (
            (ctypes.c_ubyte * len(block)).from_buffer_copy(block),
            (ctypes.c_uint32 * len(params))(*params),
            (_Launch * len(described))(*described),
            (_Patch * len(patches))(*patches),
        )
        starts = [ctypes.addressof(array) for array in self._arrays]
        self._plan = _Plan(*starts, len(block), len(described), len(patches), device)
        self.address = ctypes.addressof(self._plan)
        self._function: Callable[..., int] = library.arb_launch
        self._of_group: Callable[..., int] = library.arb_launch_group

    def run(self, stream: int, x: int, out: int, extra: int, scratch: int) -> None:
        """Queues the launches with these addresses (0 for one that no launch has).

        Raises:
            RuntimeError: the driver refuses one.
        """
        code = self._function(self.address, stream, x, out, extra, scratch)
        if code:
            self.fail(code)

    def run_group(self, stream: int, x: int, scratch: int, out: int, second: int, third: int) -> None:
        """`run` of launches with a result for each of up to three products (0 for one that there is not).

        Raises:
            RuntimeError: the driver refuses one.
        """
        code = self._of_group(self.address, stream, x, scratch, out, second, third)
        if code:
            self.fail(code)

    def fail(self, code: int) -> NoReturn:
        """Raises what the driver says of this error."""
        text = self._library.arb_error(code).decode()
        raise RuntimeError(f"CUDA error {code} at the launch of a packed product: {text}.")


def _launch(launch: Ready, attributes: list[_Attribute], first: int, count: int) -> _Launch:
    warps, clusters, shared = launch.made.packed_metadata
    if min(launch.grid) < 1:
        raise Unexpected(f"a grid of {launch.grid}")
    if shared > _MOST_SHARED:
        raise Unexpected(f"{shared} bytes of shared memory")
    x, y, z = launch.grid
    return _Launch(
        function=launch.made.function,
        grid=(ctypes.c_uint32 * 3)(x * clusters, y, z),
        threads=32 * warps,
        shared=shared,
        first_param=first,
        param_count=count,
        attribute_count=len(attributes),
        attributes=(_Attribute * 4)(*attributes),
    )


def _attributes(made: Any) -> list[_Attribute]:
    """Those that Triton's launcher gives, in its order."""
    metadata = made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise Unexpected("memory that Triton allocates at a launch")
    if getattr(metadata, "instrumentation_mode", ""):
        raise Unexpected("code that watches the kernel, which may have arguments of its own")
    _, clusters, _ = made.packed_metadata
    found = []
    if metadata.launch_pdl:
        found.append(_attribute(_OVERLAPPED, 1))
    if metadata.launch_cooperative_grid:
        found.append(_attribute(_COOPERATIVE, 1))
    if clusters != 1:
        if clusters == 16:
            raise Unexpected("clusters of 16 programs")
        found += [_attribute(_CLUSTER, clusters, 1, 1), _attribute(_CLUSTER_POLICY, _SPREAD)]
    return found


def _attribute(number: int, *words: int) -> _Attribute:
    return _Attribute(number, (ctypes.c_uint32 * 3)(*words))


def _add_parameters(
    library: ctypes.CDLL, launch: Ready, block: bytearray, params: list[int], patches: list[_Patch]
) -> None:
    """Appends what the kernel takes, in the order of its arguments, then the two scratch pointers that it ends with."""
    kinds = list(launch.made.src.signature.values())
    if len(kinds) != len(launch.args):
        raise Unexpected(f"{len(launch.args)} arguments for {len(kinds)}")
    maps = list(getattr(launch.made.metadata, "tensordesc_meta", None) or ())
    bases = [getattr(arg, "base", None) for arg in launch.args]
    somewhere = next((base.data_ptr() for base in bases if isinstance(base, torch.Tensor)), 0)
    sizes = []

    def place(value: bytes, alignment: int) -> int:
        block.extend(bytes(-len(block) % alignment))
        at = len(block)
        params.append(at)
        sizes.append(len(value))
        block.extend(value)
        return at

    for kind, arg in zip(kinds, launch.args, strict=True):
        if kind == "constexpr":
            continue  # not an argument of the compiled kernel
        if not isinstance(kind, str):
            raise Unexpected(f"an argument of kind {kind}")
        if kind.startswith("*"):
            at = place(struct.pack("=Q", _address(arg)), 8)
            if isinstance(arg, Slot):
                patches.append(_Patch(arg.offset, at, arg.address, 0, 0))
        elif kind.startswith("tensordesc"):
            if not maps:
                raise Unexpected("a tensor descriptor that is no map of the copy engine")
            at = place(_tensor_map(library, arg, maps.pop(0), somewhere), _MAP_ALIGNMENT)
            if isinstance(arg.base, Slot):
                patches.append(_Patch(arg.base.offset, at, arg.base.address, 1, 0))
            for size in arg.shape:
                place(struct.pack("=i", size), 4)
            for stride in arg.strides:
                place(struct.pack("=q", stride), 8)
        elif kind in _INTEGERS:
            form = "=" + _INTEGERS[kind]
            place(struct.pack(form, arg), struct.calcsize(form))
        else:
            raise Unexpected(f"an argument of type {kind}")
    if maps:
        raise Unexpected("more maps than tensor descriptors")
    for _ in range(2):
        place(bytes(8), 8)
    declared = parameter_sizes(launch.made.asm.get("ptx", ""))
    if sizes != declared:
        raise Unexpected(f"parameters of {sizes} bytes for a kernel that takes {declared}")


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the only kernel in this assembly; empty where none is found."""
    head = re.search(r"\.entry \w+\((.*?)\)\n", ptx, re.DOTALL)
    found = [] if head is None else _DECLARED.findall(head[1])
    return [int(count or 1) * int(bits) // 8 for bits, count in found]


Tensor: TypeAlias = "torch.Tensor | Slot | None"


def _address(tensor: Tensor) -> int:
    return 0 if tensor is None or isinstance(tensor, Slot) else tensor.data_ptr()


def _tensor_map(library: ctypes.CDLL, descriptor: Any, meta: dict[str, Any] | None, somewhere: int) -> bytes:
    """The map of a `TensorDescriptor`; of one whose address is not known yet, that of a tensor somewhere else."""
    if meta is None or meta["fp4_padded"] or meta.get("is_im2col") or getattr(descriptor, "round_f32_to_tf32", False):
        raise Unexpected(f"a tensor descriptor of {meta}")
    address = _address(descriptor.base) or somewhere
    made = _made_map(descriptor, meta, address)
    # A run gives it another address, which must be all that changes. From Triton 3.7 on there is more in a map than the
    # driver put there: a bit that tensors of less than 128 KiB lose.
    elsewhere = address + 2**20
    moved = (ctypes.c_ubyte * _MAP_BYTES).from_buffer_copy(made)
    code = library.arb_move_map(ctypes.addressof(moved), elsewhere)
    if code or bytes(moved) != _made_map(descriptor, meta, elsewhere):
        raise Unexpected(f"the driver moves no map of {descriptor}")
    return made


def _made_map(descriptor: Any, meta: dict[str, Any], address: int) -> bytes:
    """What Triton's own launcher would make for this address."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # the name in 3.6
    try:
        made = fill(
            *(address, meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]),
            *(meta["block_size"], descriptor.shape, descriptor.strides, 1 if descriptor.padding == "nan" else 0),
        )
    except RuntimeError as refused:
        raise Unexpected(f"the driver makes no map of {descriptor}: {refused}") from refused
    # the last member of the object, `PyCUtensorMap`
    return ctypes.string_at(id(made) + type(made).__basicsize__ - _MAP_BYTES, _MAP_BYTES)
