"""Runs a fragment of PTX for warps of 32 lanes, in numpy: only the instructions that the kernels' fragments use.

Registers are uint32 (16-bit and predicate ones too), `[..., 32]`: leading dimensions are warps. The meaning of each
instruction is that of NVIDIA's PTX ISA; the operands of `mma` lie in the lanes as its figures of m16n8k128 show. What
is not known, of another type than its instruction, used before it is set, or read after an output that may share its
register was written, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

LANES = 32
_BITS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int32)
# types of registers that an instruction's type takes: its own, and untyped ones of the same size
_TAKES = {
    "f32": ("f32", "b32"),
    "s32": ("s32", "u32", "b32"),
    "u32": ("s32", "u32", "b32"),
    "s16": ("s16", "b16"),
    "b32": ("f32", "s32", "u32", "b32"),
    "pred": ("pred",),
}


def bits(values: np.ndarray) -> np.ndarray:
    """float32 or int32 as register contents."""
    return np.ascontiguousarray(values).view(np.uint32)


def floats(register: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(register).view(np.float32)


def ints(register: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(register).view(np.int32)


def run(ptx: str, constraints: str, inputs: list[np.ndarray], rcp_error: int = 0) -> list[np.ndarray]:
    """The outputs `$0`, `$1`, ... of a fragment.

    Args:
        ptx: `{ declarations; instructions; }`.
        constraints: "=r,=&f,r,f": outputs first.
        inputs: uint32 `[..., 32]`, in the order of the constraints.
        rcp_error: units in the last place by which the approximate reciprocal is wrong: -1, 0 or 1.
    """
    return _Fragment(constraints, inputs, rcp_error).run(ptx)


class _Fragment:
    def __init__(self, constraints: str, inputs: list[np.ndarray], rcp_error: int):
        kinds = constraints.split(",")
        self.outputs = sum(kind.startswith("=") for kind in kinds)
        assert all(kind.startswith("=") for kind in kinds[: self.outputs]), "outputs stand first"
        assert len(inputs) == len(kinds) - self.outputs, (len(inputs), constraints)
        # an output without & may be given the register of any input
        self.shared = {f"${i}" for i, kind in enumerate(kinds) if kind.startswith("=") and "&" not in kind}
        self.shared_written = False
        self.rcp_error = rcp_error
        self.types = {f"${i}": {"r": "b32", "f": "f32"}[kind.lstrip("=&")] for i, kind in enumerate(kinds)}
        self.registers = {f"${self.outputs + i}": np.asarray(value) for i, value in enumerate(inputs)}
        assert all(value.dtype == np.uint32 for value in self.registers.values())
        self.shape = np.broadcast_shapes((LANES,), *(value.shape for value in self.registers.values()))
        assert self.shape[-1] == LANES

    def run(self, ptx: str) -> list[np.ndarray]:
        body = re.fullmatch(r"\{(.*)\}", ptx.strip(), re.DOTALL)
        assert body, "the fragment needs a scope of its own for its registers"
        *statements, rest = body[1].split(";")
        assert not rest.strip(), f"no semicolon after {rest!r}"
        for statement in statements:
            self._statement(statement.strip())
        return [np.broadcast_to(self.registers[f"${i}"], self.shape) for i in range(self.outputs)]

    def _statement(self, statement: str) -> None:
        declared = re.fullmatch(r"\.reg \.(\w+) (.*)", statement)
        if declared:
            assert declared[1] in {register for taken in _TAKES.values() for register in taken}, statement
            for name in declared[2].split(","):
                several = re.fullmatch(r"(\w+)<(\d+)>", name.strip())
                names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name.strip()]
                for each in names:
                    assert re.fullmatch(r"[A-Za-z]\w*", each), statement
                    assert each not in self.types, f"{each} is declared twice"
                    self.types[each] = declared[1]
            return
        opcode, _, operands = statement.partition(" ")
        if opcode not in _INSTRUCTIONS:
            raise NotImplementedError(f"unknown instruction: {statement}")
        target, sources, function = _INSTRUCTIONS[opcode]
        found = [operand.strip() for operand in re.findall(r"\{[^}]*\}|[^,{}\s][^,{}]*", operands)]
        assert len(found) == len(sources) + 1, f"{statement}: {len(found)} operands"
        values = [self._read(operand, kind, statement) for operand, kind in zip(found[1:], sources, strict=True)]
        with np.errstate(all="ignore"):
            result = function(self, *values)
        targets = found[0].strip("{}").split(",") if found[0].startswith("{") else [found[0]]
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip((name.strip() for name in targets), results, strict=True):
            self._check(name, target, statement)
            assert not name.startswith("$") or int(name[1:]) < self.outputs, f"{statement} writes an input"
            self.shared_written |= name in self.shared
            self.registers[name] = np.ascontiguousarray(np.broadcast_to(value, self.shape))

    def _check(self, name: str, kind: str, statement: str) -> None:
        assert name in self.types, f"{statement}: {name} is not declared"
        assert self.types[name] in _TAKES[kind], f"{statement}: {name} is {self.types[name]}, not {kind}"

    def _read(self, operand: str, kind: str, statement: str) -> np.ndarray | tuple[np.ndarray, ...]:
        if operand.startswith("{"):
            return tuple(self._read(each.strip(), kind, statement) for each in operand.strip("{}").split(","))
        if operand == "%laneid":
            return np.arange(LANES, dtype=np.uint32)
        if kind == "imm" or re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", operand):
            assert kind not in ("f32", "pred"), statement
            return np.uint32(int(operand, 0) & 0xFFFFFFFF)
        if re.fullmatch(r"0f[0-9A-F]{8}", operand):
            assert kind == "f32", statement
            return np.uint32(int(operand[2:], 16))
        self._check(operand, kind, statement)
        assert operand in self.registers, f"{statement}: {operand} has no value yet"
        is_input = operand.startswith("$") and int(operand[1:]) >= self.outputs
        assert not (is_input and self.shared_written), f"{statement}: {operand} may have become an output"
        return self.registers[operand]


def _mask_is_full(mask: np.ndarray) -> None:
    assert mask == 0xFFFFFFFF, "all lanes take part"


def _max_nan(self: _Fragment, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    largest = bits(np.maximum(floats(a), floats(b)))  # numpy's gives NaN where either is
    return np.where(np.isnan(floats(largest)), np.uint32(0x7FFFFFFF), largest)


def _redux_max(self: _Fragment, a: np.ndarray, mask: np.ndarray) -> np.ndarray:
    _mask_is_full(mask)
    return np.broadcast_to(a, self.shape).max(-1, keepdims=True)


def _redux_add(self: _Fragment, a: np.ndarray, mask: np.ndarray) -> np.ndarray:
    _mask_is_full(mask)
    return np.broadcast_to(a, self.shape).sum(-1, keepdims=True, dtype=np.uint32)


def _rcp(self: _Fragment, a: np.ndarray) -> np.ndarray:
    value = np.float32(1) / floats(a)
    moved = bits((ints(value) + np.int32(self.rcp_error)).astype(np.int32))
    return np.where(np.isfinite(value) & (value != 0), moved, bits(value))


def _to_s16(self: _Fragment, a: np.ndarray) -> np.ndarray:
    value = np.rint(floats(a).astype(np.float64))  # ties to even; out of range is clamped, NaN is 0
    return bits(np.where(np.isnan(value), 0, np.clip(value, -(2**15), 2**15 - 1)).astype(np.int32)) & np.uint32(0xFFFF)


def _prmt(self: _Fragment, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(pool)
    for i in range(4):
        nibble = int(selector) >> 4 * i & 0xF
        assert nibble < 8, "bytes that repeat a sign are not known here"
        result |= (pool >> np.uint64(8 * nibble) & np.uint64(0xFF)) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _bfly(self: _Fragment, a: np.ndarray, lanes: np.ndarray, clamp: np.ndarray, mask: np.ndarray) -> np.ndarray:
    _mask_is_full(mask)
    assert clamp == 31, "the whole warp is one segment"
    return np.broadcast_to(a, self.shape)[..., np.arange(LANES) ^ int(lanes)]


def _idx(self: _Fragment, a: np.ndarray, lanes: np.ndarray, clamp: np.ndarray, mask: np.ndarray) -> np.ndarray:
    _mask_is_full(mask)
    assert clamp == 31, "the whole warp is one segment"
    source = np.broadcast_to(lanes, self.shape).astype(np.int64) & 31
    return np.take_along_axis(np.broadcast_to(a, self.shape), source, -1)


def _shf_l_wrap(self: _Fragment, low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both << (count & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _lop3(self: _Fragment, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros(self.shape, dtype=np.uint32)
    for i in range(8):
        if int(table) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _fma(self: _Fragment, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # float64 holds the product of two float32 exactly; the sum is then rounded twice, which is 1e-16 off at most
    return bits((floats(a).astype(np.float64) * floats(b) + floats(c)).astype(np.float32))


def _mma(self: _Fragment, a: tuple, b: tuple, c: tuple) -> tuple[np.ndarray, ...]:
    """D = popc(A and B) + C, A 16 x 128 bits, B 128 x 8 bits, D and C 16 x 8 int32.

    Lane 4 g + t: A bits 32 t .. 32 t + 31 of rows g and g + 8, B the same bits of column g, D and C columns 2 t and
    2 t + 1 of row g, then of row g + 8.
    """
    assert (len(a), len(b), len(c)) == (2, 1, 4)

    def whole(registers: tuple) -> np.ndarray:  # [..., rows, 4 words]
        parts = [np.broadcast_to(r, self.shape).reshape(*self.shape[:-1], 8, 4) for r in registers]
        return np.concatenate(parts, -2)

    both = whole(a)[..., :, None, :] & whole(b)[..., None, :, :]  # [..., 16, 8, 4]
    count = _BITS[np.ascontiguousarray(both).view(np.uint8)].sum(-1).astype(np.int32)  # [..., 16, 8]
    lane = np.arange(LANES)
    row, column = lane // 4, lane % 4 * 2
    places = ((row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1))
    return tuple(bits(count[..., r, n]) + start for (r, n), start in zip(places, c, strict=True))


def _mma_half(self: _Fragment, a: tuple, b: tuple, c: tuple) -> tuple[np.ndarray, ...]:
    """D = A B + C, A 16 x 16 and B 16 x 8 of float16 (subnormal ones too), D and C 16 x 8 float32.

    Lane 4 g + t: A columns 2 t and 2 t + 1 of row g, then of row g + 8, then columns 2 t + 8 and 2 t + 9 of both; B
    rows 2 t and 2 t + 1 of column g, then 2 t + 8 and 2 t + 9; D and C as in `_mma`. The sum is rounded once: the
    hardware's is less exact.
    """
    assert (len(a), len(b), len(c)) == (4, 2, 4)

    def halves(register: np.ndarray) -> np.ndarray:  # [..., 8, 8 neighbouring columns]
        whole = np.ascontiguousarray(np.broadcast_to(register, self.shape)).view(np.float16)
        return whole.reshape(*self.shape[:-1], 8, 8).astype(np.float64)

    top, bottom = (np.concatenate([halves(a[i]), halves(a[i + 2])], -1) for i in (0, 1))
    left = np.concatenate([top, bottom], -2)  # [..., 16, 16]
    right = np.concatenate([halves(b[0]), halves(b[1])], -1)  # [..., 8 tokens, 16]
    product = left @ np.swapaxes(right, -1, -2)
    lane = np.arange(LANES)
    row, column = lane // 4, lane % 4 * 2
    places = ((row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1))
    return tuple(
        bits((product[..., r, n] + floats(start)).astype(np.float32)) for (r, n), start in zip(places, c, strict=True)
    )


def _select(self: _Fragment, a: np.ndarray, b: np.ndarray, predicate: np.ndarray) -> np.ndarray:
    return np.where(predicate != 0, a, b)


def _float_op(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda self, *values: bits(np.asarray(function(*(floats(v) for v in values)), dtype=np.float32))


def _int_op(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda self, *values: function(*values)


_copy = _int_op(lambda a: a)
_INSTRUCTIONS: dict[str, tuple[str, tuple[str, ...], Callable]] = {
    "mov.b32": ("b32", ("b32",), _copy),
    "mov.u32": ("u32", ("u32",), _copy),
    "abs.f32": ("f32", ("f32",), _float_op(np.abs)),
    "max.NaN.f32": ("f32", ("f32", "f32"), _max_nan),
    "mul.f32": ("f32", ("f32", "f32"), _float_op(np.multiply)),
    "add.f32": ("f32", ("f32", "f32"), _float_op(np.add)),
    "sub.f32": ("f32", ("f32", "f32"), _float_op(np.subtract)),
    "fma.rn.f32": ("f32", ("f32", "f32", "f32"), _fma),
    "rcp.approx.f32": ("f32", ("f32",), _rcp),
    "redux.sync.max.u32": ("u32", ("u32", "imm"), _redux_max),
    "redux.sync.add.s32": ("s32", ("s32", "imm"), _redux_add),
    "setp.gt.f32": ("pred", ("f32", "f32"), lambda self, a, b: (floats(a) > floats(b)).astype(np.uint32)),
    "setp.gt.u32": ("pred", ("u32", "u32"), _int_op(lambda a, b: (a > b).astype(np.uint32))),
    "setp.eq.u32": ("pred", ("u32", "u32"), _int_op(lambda a, b: (a == b).astype(np.uint32))),
    "selp.f32": ("f32", ("f32", "f32", "pred"), _select),
    "selp.b32": ("b32", ("b32", "b32", "pred"), _select),
    "cvt.rni.s16.f32": ("s16", ("f32",), _to_s16),
    "cvt.s32.s16": ("s32", ("s16",), _int_op(lambda a: bits(a.astype(np.uint16).view(np.int16).astype(np.int32)))),
    "cvt.rn.f32.s32": ("f32", ("s32",), lambda self, a: bits(ints(a).astype(np.float32))),
    "add.s32": ("s32", ("s32", "s32"), _int_op(np.add)),
    "mad.lo.s32": ("s32", ("s32", "s32", "s32"), _int_op(lambda a, b, c: a * b + c)),
    "xor.b32": ("b32", ("b32", "b32"), _int_op(np.bitwise_xor)),
    "and.b32": ("b32", ("b32", "b32"), _int_op(np.bitwise_and)),
    "shr.u32": ("u32", ("u32", "u32"), _int_op(np.right_shift)),
    "prmt.b32": ("b32", ("b32", "b32", "imm"), _prmt),
    "shf.l.wrap.b32": ("b32", ("b32", "b32", "u32"), _shf_l_wrap),
    "lop3.b32": ("b32", ("b32", "b32", "b32", "imm"), _lop3),
    "shfl.sync.idx.b32": ("b32", ("b32", "b32", "imm", "imm"), _idx),
    "shfl.sync.bfly.b32": ("b32", ("b32", "imm", "imm", "imm"), _bfly),
    "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc": ("s32", ("b32", "b32", "s32"), _mma),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": ("f32", ("b32", "b32", "f32"), _mma_half),
}
