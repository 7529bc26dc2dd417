"""The native kernels of 64-bit Arm processors on another one: compiled for it and run by QEMU's emulator."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import torch

from optimum_arb.format.packing import TENSOR_NAMES
from optimum_arb.ops.backends.cpu import native
from optimum_arb.ops.backends.cpu.structures import Dequantize, Linear
from optimum_arb.ops.backends.packed import PackedWeight

SOURCES = Path(native.__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-static")  # those of setup.py
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
BYTES = {0: 4, 1: 2, 2: 2}  # of the numbers of `operands.TYPES`


def compiler() -> list[str] | None:
    """A compiler for 64-bit Arm Linux: gcc, or Zig's clang (`pip install ziglang`)."""
    if gcc := shutil.which("aarch64-linux-gnu-gcc"):
        return [gcc]
    if importlib.util.find_spec("ziglang") is None:
        return None
    return [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]


class EmulatedLibrary:
    """In place of the library that `native.load` returns.

    Args:
        folder: for the program.
        processor: that QEMU is to be.
    """

    def __init__(self, folder: Path, processor: str = "max"):
        command, program = compiler(), folder / "arm_calls"
        assert command is not None
        assert EMULATOR is not None
        source = str(Path(__file__).with_name("arm_calls.c"))
        subprocess.run([*command, *FLAGS, f"-I{SOURCES}", source, "-o", str(program), "-lm"], check=True)
        self._process = subprocess.Popen(
            [EMULATOR, "-cpu", processor, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.kernels = {name: index for index, name in enumerate(self._out.readline().decode().split())}
        self._known: dict[int, bytes] = {}

    def close(self) -> None:
        self._in.close()
        assert self._process.wait(30) == 0

    def know(self, packed: PackedWeight, *tensors: torch.Tensor | None) -> None:
        """What the pointers of the next calls point to: with the tables of the layout, these."""
        every = [*(getattr(packed, name) for name in TENSOR_NAMES), *tensors]
        self._known = {t.data_ptr(): t.view(-1).view(torch.uint8).numpy().tobytes() for t in every if t is not None}
        for table in (*native._plan(packed.layout.name), native._dequantize_terms(packed.layout.name)):
            self._known[ctypes.addressof(table)] = bytes(table)

    def arb_linear(self, reference, index: int) -> int:
        problem: Linear = reference._obj
        return self._call(0, problem, index, {"out": problem.m * problem.rows * BYTES[problem.x_type]})

    def arb_dequantize(self, reference, index: int) -> None:
        problem: Dequantize = reference._obj
        size = problem.rows * problem.tiles * 8 * native.LANES * 4
        scales = problem.threads * problem.blocks * problem.row_scales * 4
        assert self._call(1, problem, index, {"out": size, "scales": scales}) == 0

    def _call(self, function: int, problem: ctypes.Structure, index: int, written: dict[str, int]) -> int:
        message = [struct.pack("<3q", function, index, ctypes.sizeof(problem)), bytes(problem)]
        pointers = [
            name for name, kind in problem._fields_ if kind is ctypes.c_void_p and getattr(problem, name) is not None
        ]
        message.append(struct.pack("<q", len(pointers)))
        for name in pointers:
            offset = getattr(type(problem), name).offset
            if name in written:
                message.append(struct.pack("<3q", offset, written[name], 0))
            else:
                content = self._known[getattr(problem, name)]
                message += [struct.pack("<3q", offset, len(content), 1), content]
        message.append(struct.pack("<q", type(problem).out.offset))
        self._in.write(b"".join(message))
        self._in.flush()
        (failed,) = struct.unpack("<q", self._out.read(8))
        ctypes.memmove(problem.out, self._out.read(written["out"]), written["out"])
        return failed
