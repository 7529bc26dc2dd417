"""Runs a whole compiled kernel's PTX, in numpy: straight code without branches or shared memory, all warps at once.

Registers are uint64 `[programs, warps, 32]`, of which an instruction takes the bits of its type. Memory is the tensors
that were given: what lies outside of them, misaligned access, and instructions that are not known are errors.
"""

from __future__ import annotations

import re

import numpy as np
import torch

_BASE = 1 << 36  # address of the first tensor, and the distance from one to the next
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}]+")
_WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}


def view(value: np.ndarray, kind: str) -> np.ndarray:
    """Register contents as numbers of a PTX type."""
    if kind == "bf16":
        return ((value & 0xFFFF) << 16).astype(np.uint32).view(np.float32)
    width = int(re.sub(r"\D", "", kind)) if kind != "pred" else 8
    letter = {"b": "u", "s": "i", "p": "u"}.get(kind[0], kind[0])
    return np.ascontiguousarray(value).astype(f"u{width // 8}").view(f"{letter}{width // 8}")


def register(value: np.ndarray) -> np.ndarray:
    """Numbers as register contents; signed ones are extended, as in the wider registers that hold them."""
    if value.dtype.kind == "i":
        return value.astype(np.int64).view(np.uint64)
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").astype(np.uint64)


class Kernel:
    """A compiled kernel.

    Args:
        ptx: of one entry.
        grid: programs, `(x, y, z)`.
        warps: of a program.
        params: tensors, integers, in the order of the entry's parameters.
    """

    def __init__(self, ptx: str, grid: tuple[int, int, int], warps: int, params: list[torch.Tensor | int]):
        self.grid, self.warps = grid, warps
        self.shape = (grid[0] * grid[1] * grid[2], warps, 32)
        self.memory: list[np.ndarray] = []
        self.params: list[int] = []
        for param in params:
            if isinstance(param, torch.Tensor):
                self.params.append(_BASE * (1 + len(self.memory)))
                self.memory.append(param.view(torch.uint8).numpy().reshape(-1))
            else:
                self.params.append(param)
        self.registers: dict[str, np.ndarray] = {}
        body = re.search(r"\.entry.*?\)\s*(?:\.\w+ [^\n{]*\n)*\{(.*?)\n\}", ptx, re.DOTALL)
        assert body
        text = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*|^[$\w]+:\s*$", "", body[1], flags=re.MULTILINE)
        with np.errstate(all="ignore"):
            for statement in text.split(";"):
                stripped = re.sub(r"^[{}\s]+", "", statement).strip()
                if stripped and not stripped.startswith((".", "ret", "griddepcontrol")):
                    self._statement(stripped)

    def _statement(self, text: str) -> None:
        guard = np.ones(self.shape, dtype=bool)
        guarded = re.match(r"@(!?)(%?\w+)\s+(.*)", text, re.DOTALL)
        if guarded:
            guard = (self.registers[guarded[2]] != 0) ^ bool(guarded[1])
            text = guarded[3]
        opcode, rest = text.split(None, 1)
        operands = _OPERAND.findall(rest)
        parts = opcode.split(".")
        if parts[0] in ("ld", "st") and parts[1] == "global":
            self._access(parts, operands, guard)
            return
        if opcode == "mov.b32" and operands[0].startswith("{"):
            value = self._read(operands[1], "b32")
            for half, name in enumerate(re.findall(r"[%\w]+", operands[0])):
                if name != "_":
                    self._write(name, register(value >> np.uint32(16 * half) & np.uint32(0xFFFF)), guard)
            return
        self._write(operands[0], self._result(parts, operands[1:]), guard)

    def _write(self, name: str, value: np.ndarray, guard: np.ndarray) -> None:
        value = np.broadcast_to(value, self.shape).astype(np.uint64)
        if not guard.all():
            value = np.where(guard, value, self.registers[name])
        self.registers[name] = value

    def _read(self, operand: str, kind: str) -> np.ndarray:
        if operand.startswith("{"):  # two halves
            low, high = (self._read(name, "b16").astype(np.uint64) for name in re.findall(r"[%\w]+", operand))
            return view(low | high << np.uint64(16), kind)
        program, warp, lane = np.indices(self.shape)
        x, y, _ = self.grid
        special = {
            "%tid.x": warp * 32 + lane,
            "%laneid": lane,
            "%ctaid.x": program % x,
            "%ctaid.y": program // x % y,
            "%ctaid.z": program // (x * y),
            "%nctaid.y": np.full(self.shape, y),
        }
        if operand in special:
            value = special[operand].astype(np.uint64)
        elif re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            value = np.full(self.shape, int(operand[2:], 16), dtype=np.uint64)
        elif re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+U?", operand):
            number = int(operand.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF
            value = np.full(self.shape, number, dtype=np.uint64)
        else:
            value = self.registers[operand]
        return view(value, kind)

    def _access(self, parts: list[str], operands: list[str], guard: np.ndarray) -> None:
        """Loads and stores, of one or several neighbouring elements."""
        load = parts[0] == "ld"
        names, place = (operands[0], operands[1]) if load else (operands[1], operands[0])
        found = re.fullmatch(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", place)
        assert found, place
        address = self.registers[found[1]].view(np.int64)[guard] + int(found[2] or 0)
        width = _WIDTH[re.sub(r"\D", "", parts[-1])]
        registers = re.findall(r"[%\w]+", names)
        assert not (address % (width * len(registers))).any(), f"misaligned: {parts} {operands}"
        for i, name in enumerate(registers):
            values = np.zeros(self.shape, dtype=np.uint64) if load else self._read(name, f"b{8 * width}")
            numbers = np.zeros(address.shape, dtype=np.uint64)
            for buffer, data in enumerate(self.memory):
                here = address // _BASE == buffer + 1
                at = address[here] % _BASE + i * width
                assert not here.any() or at.max() + width <= len(data), f"outside of tensor {buffer}: {parts}"
                for byte in range(width):
                    if load:
                        numbers[here] |= data[at + byte].astype(np.uint64) << np.uint64(8 * byte)
                    else:
                        data[at + byte] = values[guard][here] >> np.array(8 * byte, values.dtype) & np.array(
                            255, values.dtype
                        )
            known = (address >= _BASE) & (address < _BASE * (len(self.memory) + 1))
            assert known.all(), f"no tensor is there: {parts} {operands}"
            if load:
                values[guard] = numbers
                self._write(name, values, guard)

    def _result(self, parts: list[str], operands: list[str]) -> np.ndarray:
        name, kind = parts[0], parts[-1]

        def read(kinds: str | list[str]) -> list[np.ndarray]:
            each = [kinds] * len(operands) if isinstance(kinds, str) else kinds
            return [self._read(operand, one) for operand, one in zip(operands, each, strict=True)]

        if parts[:2] == ["ld", "param"]:
            number = re.search(r"_param_(\d+)\]", operands[0])
            assert number
            return np.full(self.shape, self.params[int(number[1])] & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        if name == "mov":
            return register(read(kind)[0])
        if name in ("mul", "mad"):
            if kind == "f32":
                return register(np.multiply(*read(kind)))
            wide = parts[1] == "wide"
            assert wide or parts[1] == "lo"
            double = kind[0] + "64" if wide else kind
            left, right, *added = read([kind, kind, double][: len(operands)])
            product = left.astype(view(np.uint64(0), double).dtype) * right
            return register(product + added[0] if added else product)
        if name == "fma":
            a, b, c = read("f32")
            return register((a.astype(np.float64) * b + c).astype(np.float32))
        if name in ("min", "max"):
            a, b = read(kind)
            assert kind != "f32" or parts[1] == "NaN"
            return register(np.minimum(a, b) if name == "min" else np.maximum(a, b))
        if name in ("add", "sub", "and", "or", "xor"):
            function = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or}
            return register(function.get(name, np.bitwise_xor)(*read(kind)))
        if name in ("shl", "shr"):
            value, count = read([kind, "u32"])
            assert (count < 8 * value.dtype.itemsize).all()
            return register(np.left_shift(value, count) if name == "shl" else np.right_shift(value, count)).astype(
                np.uint64
            )
        if name == "bfe":
            value, at, count = read([kind, "u32", "u32"])
            top = np.uint32(32) - count
            return register((value << (top - at).astype(value.dtype)) >> top.astype(value.dtype))
        if name == "abs":
            return register(np.abs(read(kind)[0]))
        if name == "rcp":
            return register(np.float32(1) / read(kind)[0])
        if name == "selp":
            a, b, predicate = read([kind, kind, "pred"])
            return register(np.where(predicate != 0, a, b))
        if name == "setp":
            assert len(parts) == 3
            a, b = read(kind)
            compare = {"eq": np.equal, "ne": np.not_equal, "neu": np.not_equal, "lt": np.less, "le": np.less_equal}
            compare |= {"gt": np.greater, "ge": np.greater_equal}
            return compare[parts[1]](a, b).astype(np.uint64)
        if name == "cvt":
            return self._convert(parts, self._read(operands[0], kind))
        if name == "lop3":
            a, b, c, table = read("b32")
            found = np.zeros(self.shape, dtype=np.uint32)
            for i in range(8):
                if int(table.flat[0]) >> i & 1:
                    found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            return register(found)
        if name == "prmt":
            return self._permute(*read("b32"))
        if name == "shf":
            assert parts[1:3] == ["l", "wrap"]
            low, high, count = (value.astype(np.uint64) for value in read("u32"))
            return (high << np.uint64(32) | low) << (count & np.uint64(31)) >> np.uint64(32)
        if name == "shfl":
            value, lanes, clamp, mask = read("b32")
            assert (clamp == 31).all()
            assert (mask == 0xFFFFFFFF).all()
            source = lanes & 31 if parts[2] == "idx" else np.indices(self.shape)[2] ^ lanes
            return register(np.take_along_axis(value, source.astype(np.int64), -1))
        if name == "redux":
            value, mask = read([kind, "b32"])
            assert (mask == 0xFFFFFFFF).all()
            found = value.max(-1, keepdims=True) if parts[2] == "max" else value.sum(-1, keepdims=True)
            return register(found.astype(value.dtype))
        raise NotImplementedError(".".join(parts) + " " + ", ".join(operands))

    def _convert(self, parts: list[str], value: np.ndarray) -> np.ndarray:
        to, source = parts[-2:]
        target = view(np.uint64(0), to).dtype
        if value.dtype.kind == "f" and target.kind == "i":
            assert parts[1] == "rni"
            limits = np.iinfo(target)
            rounded = np.nan_to_num(np.rint(value.astype(np.float64)), nan=0)
            return register(np.clip(rounded, limits.min, limits.max).astype(target))
        assert to != "bf16", source
        return register(value.astype(target))

    def _permute(self, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros(self.shape, dtype=np.uint64)
        for i in range(4):
            nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = pool >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            found |= np.where(nibble >> np.uint64(3), sign, byte) << np.uint64(8 * i)
        return found
