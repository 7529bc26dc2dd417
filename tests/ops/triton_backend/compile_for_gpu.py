"""Compiles the kernels for NVIDIA's and AMD's GPUs without one and reads the machine code; `test_compile.py` runs this.

Triton's launcher is told of a GPU that is not there and stops short of the launch, so that what is compiled is what
the calls of the package would run.
"""

import contextlib
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from packed_weights import random_packed
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from optimum_arb.format.layout import all_layouts, layout_from_name
from optimum_arb.ops.backends.triton import (
    available,
    columns,
    digits,
    dispatch,
    gemm,
    gemm_config,
    hadamard,
    half_bits,
    launch,
    one_bit,
    sums,
)
from optimum_arb.ops.backends.triton.dequantize import dequantize
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig
from optimum_arb.ops.backends.triton.prepack import join, prepack

# wavefronts of AMD's GPUs that can be asked for
AMD = {"gfx942": 64, "gfx1100": 32}
ASKED = next((name for name in AMD if name in sys.argv), None)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# layout, permuted, config
QUICK = [
    ("planes-1-col", True, GemmConfig("hopper", 8, 64, 4, 3, 2, 2)),
    ("planes-2-col", True, GemmConfig("hopper", 128, 256, 8, 4, 1, 1)),
]
# with those, each shape of program, one and two tiles a slot, one to three planes
MORE = [
    ("planes-2-col", True, GemmConfig("hopper", 16, 64, 4, 3, 1, 2)),
    ("planes-2", False, GemmConfig("hopper", 64, 64, 4, 4, 1, 1)),
    ("planes-2", False, GemmConfig("hopper", 256, 128, 8, 3, 1, 1)),
    ("planes-3-mean", False, GemmConfig("hopper", 64, 128, 8, 3, 1, 2)),
    ("planes-2-col", True, GemmConfig("hopper", 16, 64, 4, 3, 2, 2, True)),
    ("planes-2-col", False, GemmConfig("hopper", 32, 128, 4, 4, 1, 1, True)),
    ("planes-3-col", False, GemmConfig("hopper", 64, 128, 8, 3, 1, 2, True)),
]


# bytes that a program may have
SHARED_MEMORY: dict[int | str | None, int] = {"gfx942": 64 << 10, "gfx1100": 64 << 10} | {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}


class NoDevice:
    """As much of a driver as compiling asks for."""

    arch = next((int(word[3:]) for word in sys.argv if word.startswith("sm_")), 90)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32) if ASKED is None else GPUTarget("hip", ASKED, AMD[ASKED])


def operands_overwritten(code: str) -> list[str]:
    """Instructions that write a register from which a product that is not waited for yet still reads its operand."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if line.startswith(".L"):
            labels[line.rstrip(":").strip()] = len(lines)
        lines.append(line)
        # what a loop leaves in flight meets the loop's own beginning
        back = re.search(r"BRA `\((\.L\w+)\)", line)
        if back and back[1] in labels:
            lines += lines[labels[back[1]] :]
    found = []
    in_flight: set[int] = set()
    for line in lines:
        text = re.sub(r"^\s*/\*[0-9a-f]+\*/\s*", "", line).strip()
        text = re.sub(r"^@!?U?P\w+\s+", "", text)
        product = re.match(r"[HI]GMMA\S*\s+R\d+,\s*R(\d+),", text)
        if product:
            in_flight |= set(range(int(product[1]), int(product[1]) + 4))
            continue
        if text.startswith("WARPGROUP.DEPBAR"):
            in_flight.clear()
            continue
        written = re.match(r"([A-Z0-9_.]+)\s+(?:P\w+,\s*)?R(\d+)\b", text)
        if written and not written[1].startswith(("ST", "RED", "HGMMA", "IGMMA", "R2UR", "SYNCS.ARRIVE")):
            width = 4 if ".128" in written[1] else 2 if ".64" in written[1] or ".WIDE" in written[1] else 1
            if in_flight & set(range(int(written[2]), int(written[2]) + width)):
                found.append(text)
    return found


def disassemble(kernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def few_tokens(
    layout: str,
    tokens: int,
    permuted: bool,
    rows: tuple[int, ...],
    config: one_bit.DecodeConfig | half_bits.HalfConfig,
    block: int = 0,
    columns: int = 320,
    scales: torch.dtype = torch.float16,
) -> None:
    """Asks for the kernels of a product of few tokens, of weights joined where there are several, of inputs that go
    through a Hadamard transform of so many columns first."""
    x = torch.zeros(tokens, columns, dtype=torch.bfloat16)
    packed = [random_packed(layout_from_name(layout), count, columns, permuted=permuted) for count in rows]
    parts = [prepack(replace(each, row_scale=each.row_scale.to(scales))) for each in packed]
    bias = None if permuted else torch.zeros(sum(rows), dtype=torch.bfloat16)
    weight = parts[0] if len(parts) == 1 else join(parts)
    assert weight is not None
    change = None if not block else (None, torch.ones(columns, dtype=torch.int8), block)
    multiply = one_bit.decode if isinstance(config, one_bit.DecodeConfig) else half_bits.multiply
    out = multiply(x, weight, bias, config, rows if len(rows) > 1 else None, change=change)
    assert out.shape == (tokens * sum(rows),)


def misaligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same, at an address that 16 bytes do not divide."""
    if tensor is None:
        return None
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def calls():
    """Weights of many kinds, each with what is to be multiplied with it: configs, dtypes of x, biases."""
    fused = [GemmConfig("hopper", 64, 64, 4, 2, split_k) for split_k in (1, 2)]
    fused += [GemmConfig("hopper", 32, 128, 8, 3, 1, 2), GemmConfig("hopper", 64, 64, 4, 4, 1)]
    fused.append(GemmConfig("hopper", 64, 64, 4, 2, 2, 1, True))
    portable = [GemmConfig("portable", 64, 64, 4, 2), GemmConfig("portable", 16, 128, 8, 2, 2)]
    few = [GemmConfig("digits", 16, 64, 4, 2, 1, 4), GemmConfig("digits", 16, 64, 4, 2, 2, 2)]
    fields = ("row_scale", "col_scale", "permutation", "salient_columns", "salient_weight", "salient_col_scale")
    for name in ("planes-1-col", "planes-2-col", "planes-3-mean", "groups-all-salient-col"):
        for rows, width, block_size, permuted in ((48, 512, 128, True), (17, 512, -1, False), (48, 576, 64, True)):
            packed = random_packed(layout_from_name(name), rows, width, block_size, permuted=permuted)
            moved = {field: misaligned(getattr(packed, field)) for field in fields}
            longer = {field: t if t is None or t.dtype != torch.float16 else t.float() for field, t in moved.items()}
            weights = [packed, replace(packed, **moved), replace(packed, weight=misaligned(packed.weight))]
            weights.append(replace(packed, **longer))
            for weight in weights:
                configs = [] if weight.layout.salient else [*portable, *few]
                if name.startswith("planes") and not width % 128 and not weight.weight.data_ptr() % 16:
                    configs += fused
                half, full = torch.zeros(rows, dtype=torch.float16), torch.zeros(rows)
                biases = [(torch.bfloat16, None), (torch.bfloat16, full), (torch.float16, half)]
                biases.append((torch.float16, misaligned(half)))
                yield weight, [(config, dtype, bias) for config in configs for dtype, bias in biases]


def check_keys() -> None:
    """One key of a launch stands for one program, whatever differs, and more tokens are no reason for another."""
    launch_once = launch.Launcher.__call__
    programs: dict = {}
    kept: set = set()

    def record(self, key, grid, args, device, **options):
        *_, binder = self.kernel.device_caches[0]
        _, specialization, chosen = binder(*args, **options, debug=False, instrumentation_mode="")
        program = f"{self.kernel.__name__} {specialization} {chosen}"
        assert programs.setdefault((self, key), program) == program, f"{key}: {program}, {programs[self, key]}"
        kept.add(program)

    launch.Launcher.__call__ = record
    for weight, products in calls():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for transposed in (False, True):
                dequantize(weight, dtype, transposed=transposed)
                dequantize(weight, dtype, transposed=transposed, stored_order=True)
        width = weight.in_features
        for config, dtype, bias in products:
            wide = torch.zeros(600, 2 * width + 8, dtype=dtype)
            views = (
                wide[:, :width].contiguous(),
                wide[:, :width],
                wide[:, 1 : width + 1],
                wide[:, : 2 * width : 2],
            )
            for x in views:
                for tokens in (1, 5, 16, 129, 256, 600):
                    gemm.gemm(x[:tokens], weight, bias, config=config)
            known = len(kept)
            for x in views:
                for tokens in (7, 8, 13) if config.kernel == "digits" else (131, 144):
                    gemm.gemm(x[:tokens], weight, bias, config=config)
            assert len(kept) == known, f"{weight.layout.name} {config}: compiled anew for another number of tokens"
    launch.Launcher.__call__ = launch_once
    print(f"{len(programs)} keys, {len(kept)} programs")


def main() -> None:
    compiled = []
    launch = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        most = SHARED_MEMORY[ASKED or NoDevice.arch]
        assert kernel.metadata.shared <= most, f"{self.__name__}: {kernel.metadata.shared} bytes of {most}"
        compiled.append((self.__name__, kernel))
        return kernel

    jit.JITFunction.run = compile_only
    driver.set_active(NoDevice())
    gemm.fits_hopper = lambda packed, dtype: True
    torch.version.hip = ASKED  # not None on AMD's
    digits.takes_assembly = lambda device: ASKED is None
    digits.capability = lambda device: (0, 0) if ASKED else divmod(NoDevice.arch, 10)
    for module in (columns, digits, half_bits, hadamard, one_bit, sums):
        module.overlaps = lambda device: ASKED is None and NoDevice.arch >= 90
    half_bits.has_warpgroups = lambda device: NoDevice.arch == 90
    if "keys" in sys.argv:
        check_keys()

    x = torch.zeros(300, 2048, dtype=torch.bfloat16)
    for asked, configs in (("quick", QUICK), ("more", MORE)):
        for name, permuted, config in configs if asked in sys.argv else ():
            tokens = x[: 4 * config.block_m]
            gemm.gemm(tokens, random_packed(layout_from_name(name), 272, 2048, permuted=permuted), config=config)
            overwritten = operands_overwritten(disassemble(compiled[-1 - (config.split_k > 1)][1]))
            assert not overwritten, f"{name} {config}: {overwritten[:4]}"
    # no GPU to launch on, or to ask
    CompiledKernel.__getitem__ = lambda self, grid: lambda *args, **options: None
    torch.cuda.current_device = lambda: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    if "check" in sys.argv:
        # nothing is launched, and so nothing is written
        torch.cuda.device = lambda device: contextlib.nullcontext()
        assert math.isnan(available._hopper_self_check(torch.device("cpu")))
        programs = {kernel.hash: (name, kernel) for name, kernel in compiled}
        assert len(programs) == 4, [name for name, _ in programs.values()]
        for name, kernel in programs.values():
            assert not operands_overwritten(disassemble(kernel)), name
    if "one_bit" in sys.argv:
        few_tokens("planes-2-col", 1, True, (272,), one_bit.DecodeConfig())
        # two rounds of two tiles a warp
        few_tokens("planes-1", 2, False, (42, 7, 64), one_bit.DecodeConfig(warps=4, ahead=2), columns=1920)
        few_tokens("planes-2-col", 4, False, (64,), one_bit.DecodeConfig(), scales=torch.float32)
        few_tokens("planes-2-col", 1, True, (272,), one_bit.DecodeConfig(), 64)
        for name, kernel in compiled[-8:]:
            assert ("BMMA" in disassemble(kernel)) == (name == "_decode"), name
            waits = kernel.asm["ptx"].count("griddepcontrol.wait")
            assert bool(waits) == kernel.metadata.launch_pdl == (NoDevice.arch >= 90), name
    if "half_bits" in sys.argv:
        before = len(compiled)
        few_tokens("planes-2-col", 8, True, (272,), half_bits.HalfConfig())
        few_tokens("planes-1", 16, False, (42, 7, 64), half_bits.HalfConfig(), columns=1920)
        few_tokens("planes-1", 16, False, (64,), half_bits.HalfConfig(), scales=torch.float32)
        few_tokens("planes-2-col", 5, True, (272,), half_bits.HalfConfig(), 64)
        few_tokens("planes-2-col", 16, True, (272,), half_bits.HalfConfig(), columns=1920)
        few_tokens("planes-3-mean", 9, True, (272,), half_bits.HalfConfig(16, 1), 64)
        few_tokens("planes-2-col", 16, True, (272,), half_bits.HalfConfig(warpgroups=False), columns=1920)
        products = []
        for name, kernel in compiled[before:]:
            code = disassemble(kernel)
            found = sorted(set(re.findall(r"\bU?[A-Z]*MMA\b", code)))
            assert len(found) == (name == "_multiply"), f"{name}: {found}"
            assert not operands_overwritten(code), name
            products += found
            waits = kernel.asm["ptx"].count("griddepcontrol.wait")
            assert bool(waits) == kernel.metadata.launch_pdl == (NoDevice.arch >= 90), name
        # of more than 8 tokens by warpgroups, if they have whole ones and are to; of parts with 7 rows they have not
        many = "HGMMA" if NoDevice.arch == 90 else "HMMA"
        assert products == ["HMMA", "HMMA", many, "HMMA", many, many, "HMMA"], products
    if "one_bit_layouts" in sys.argv:
        for layout in all_layouts():
            few_tokens(layout.name, 4, True, (272,), one_bit.DecodeConfig(warps=4))
    if "digits" in sys.argv:
        for name, config, tokens, product in (
            ("planes-2-col", GemmConfig("digits", 1, 64, 4, 3, 2, 4), 1, "IMMA"),
            ("planes-1", GemmConfig("digits", 16, 64, 4, 3, 1, 2), 16, "IGMMA" if NoDevice.arch == 90 else "IMMA"),
            ("groups-non-salient-mean", GemmConfig("digits", 1, 64, 4, 3, 1, 4), 1, "IMMA"),
        ):
            gemm.gemm(x[:tokens], random_packed(layout_from_name(name), 272, 2048, permuted=True), config=config)
            code = disassemble(next(kernel for name, kernel in reversed(compiled) if name == "_multiply_kernel"))
            # tcgen05, UTCIMMA, has 27 barriers in a step
            assert set(re.findall(r"\bU?[A-Z]*MMA\b", code)) == {product}, name
            barriers = len(re.findall(r"\bBAR\.", code))
            assert barriers <= (6 if NoDevice.arch >= 90 else 9), f"{name}: {barriers} barriers"
            overwritten = operands_overwritten(code)
            assert not overwritten, f"{name} {config}: {overwritten[:4]}"
            if name != "groups-non-salient-mean":
                # four signs by an instruction or two, not one
                assert len(re.findall(r"\bPRMT\b", code)) < 60, name
    if "portable" in sys.argv:
        packed = random_packed(layout_from_name("planes-2-col"), 272, 2048)
        gemm_config.fits_hopper = lambda packed, dtype: False
        there = SimpleNamespace(is_cuda=True)
        there = SimpleNamespace(weight=there, layout=packed.layout, out_features=4096, in_features=4096)
        for tokens in (16, 128):
            defaults = gemm_config.default_config(there, tokens, x.dtype)
            assert defaults.kernel == "portable", defaults
            gemm.gemm(x[:tokens], packed, config=defaults)
        gemm.gemm(x, packed, config=dispatch.batch_invariant_config("portable"))
    if "dequantize" in sys.argv:
        for layout in all_layouts():
            dequantize(random_packed(layout, 6, 2048, permuted=True), torch.bfloat16, transposed=layout.planes == 2)
    names = sorted({name for name, _ in compiled})
    print(f"{len(compiled)} kernels: {', '.join(names)}")


if __name__ == "__main__":
    main()
