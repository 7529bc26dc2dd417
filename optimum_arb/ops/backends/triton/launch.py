"""Launches of Triton kernels that skip what Triton does anew at each of its own.

Triton's launch classifies every argument, compile-time ones too, to find the program that it compiled for them: 25 us a
kernel in Python on a fast host, 65 on a slow one, and a layer needs three. Here the caller says in a short key what
decides, and the compiled program is called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton


class Ready(NamedTuple):
    """A launch of a kernel that has been compiled and loaded.

    Attributes:
        made: what Triton's own launch returned.
        grid: programs.
        args: all arguments, compile-time ones too, by position.
    """

    made: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


class Launcher:
    """A kernel with the programs that were compiled from it.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made of a function, compile-time parameters last.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._programs: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], device: torch.device, **options: Any
    ) -> None:
        """Launches on the current stream of `device`, which must be the current device.

        Args:
            key: equal for two calls only where Triton would launch one and the same program for both: all compile-time
                arguments, `tensor_class` of the tensors, the integers that are specialized (or their `size_class`) and
                the options have to be told from it.
            grid: programs.
            args: all arguments, compile-time ones too, by position.
            device: of the tensors.
            **options: Triton's, such as num_warps.
        """
        program = self._programs.get((device.index, key))
        if program is not None:
            program(grid, args, triton.runtime.driver.active.get_current_stream(device.index))
            return
        made = self.kernel[grid](*args, **OPTIONS, **options)
        # on the CPU there is Triton's interpreter, or a compiler without a GPU
        if made is not None and device.type == "cuda":
            self._programs[(device.index, key)] = Program(made)

    def program(self, device: torch.device, key: Hashable) -> Program | None:
        """What was compiled for this key on this device, if it has been launched."""
        return self._programs.get((device.index, key))


class Launch:
    """A launch of which all but the tensors is known, and that looks for its program once.

    Args:
        launcher: of the kernel.
        key: see `Launcher`, as the others.
        grid: see there.
        device: see there.
        **options: see there.
    """

    __slots__ = ("_device", "_grid", "_key", "_launcher", "_options", "_program")

    def __init__(
        self, launcher: Launcher, key: Hashable, grid: tuple[int, int, int], device: torch.device, **options: Any
    ):
        self._launcher, self._key, self._grid, self._device, self._options = launcher, key, grid, device, options
        self._program: Program | None = None

    def __call__(self, args: tuple[Any, ...]) -> None:
        """Launches on the current stream of the device, which must be the current device, with all arguments."""
        if self._program is None:
            self._launcher(self._key, self._grid, args, self._device, **self._options)
            self._program = self._launcher.program(self._device, self._key)
        else:
            self._program(self._grid, args, triton.runtime.driver.active.get_current_stream(self._device.index))

    def ready(self, args: tuple[Any, ...]) -> Ready | None:
        """The launch with these arguments for `native_launch`, once its program is known."""
        return None if self._program is None else self._program.ready(self._grid, args)


class Program:
    """A compiled kernel, launched without what Triton prepares for profilers alone (half of the time of its launch).

    Args:
        made: what Triton's own launch returned.
    """

    __slots__ = ("_known", "made")

    def __init__(self, made: Any):
        self.made = made
        self._known: tuple[Any, Any, Any] | None = None

    def ready(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> Ready | None:
        """A launch with these arguments for `native_launch`; None without a GPU."""
        return None if self.made is None else Ready(self.made, grid, args)

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...], stream: int) -> None:
        """Launches on this stream of the current device; `args` are all, compile-time ones too."""
        if DIRECT and not hooked():
            if self._known is None:
                self._known = self.made.run, self.made.function, self.made.packed_metadata
            run, function, metadata = self._known
            run(*grid, stream, function, metadata, None, None, None, *args)
        else:
            self.made[grid](*args, stream=stream)


# Triton's own call of a compiled program prepares what only profilers read: half of its time. What lies below it is
# known of these releases alone, whose sources were read.
DIRECT = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")) and torch.version.hip is None

# What every kernel is compiled with: Triton 3.9 announces that it will no longer join products and sums unless asked
# to, and warns of it.
OPTIONS = {"enable_fp_fusion": True}


def hooked() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def tensor_class(tensor: torch.Tensor) -> tuple[torch.dtype, bool]:
    """What Triton compiles for in a tensor. One that torch has just allocated is aligned."""
    return tensor.dtype, tensor.data_ptr() % 16 == 0


def likeness(x: torch.Tensor, bias: torch.Tensor | None) -> tuple[Hashable, ...]:
    """Equal for inputs `[M, K]` and biases that one plan of launches serves."""
    if bias is None:
        return x.shape[0], x.dtype, x.data_ptr() % 16
    return x.shape[0], x.dtype, x.data_ptr() % 16, bias.dtype, bias.data_ptr() % 16


def size_class(size: int) -> tuple[bool, bool, bool]:
    """What Triton compiles for in an integer of 1 or more."""
    return size == 1, size % 16 == 0, size >= 2**31


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes ten times as long outside of a kernel."""
    return -(-a // b)


def power_of_2(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


# `torch.cuda.current_device` without its question whether CUDA was started, for where a tensor is there
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, (0, 0) of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends: from sm_90 on."""
    return capability(device)[0] >= 9
