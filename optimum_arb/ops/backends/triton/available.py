"""Whether this machine's GPU runs the kernels: asked once a device, and checked by computing."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from ....format.layout import planes_layout
from ....format.packing import BinarizedWeight, pack
from ..packed import PackedWeight

logger = logging.getLogger("optimum_arb")

# the first with `gdc_wait` and Gluon; the kernels in Gluon need 3.5, which `_works` finds, and `hopper_decode.py` 3.6
FIRST_TRITON = (3, 4)
HOPPER_TRITON = (3, 6)
# With these releases all GPU tests of the fused product passed, on an H200: nobody waits for its check, which compiles
# four programs.
HOPPER_TESTED = frozenset({(3, 6)})
# False: the Hadamard transform of few tokens is a launch of its own, as that of many
FUSE_HADAMARD = True
# mma with operands of one bit is an instruction of these; 10.0 and later emulate it slowly
ONE_BIT_CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0))
# AMD's whose matrix units, or vectors, multiply 8-bit integers: CDNA, and RDNA from 3 on
DIGITS_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def triton_version() -> tuple[int, ...]:
    """Major and minor number of the Triton that is installed."""
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: an NVIDIA GPU from compute capability 8.0 on, or an AMD one.

    Says once why not, where it is not so; the reference backend then computes.
    """
    if device.type != "cuda":
        return False
    try:
        import triton
    except ImportError:
        logger.warning(
            "Packed layers run without their GPU kernels, slowly, because Triton is not installed: pip install triton."
        )
        return False
    if triton_version() < FIRST_TRITON:
        logger.warning(
            "Packed layers run without their GPU kernels, slowly: these need Triton %d.%d, which comes with torch 2.8, "
            "and %s is installed.",
            *FIRST_TRITON,
            triton.__version__,
        )
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        logger.warning(
            "Packed layers run without their GPU kernels, slowly: these need compute capability 8.0, and %s has %d.%d.",
            torch.cuda.get_device_name(device),
            *torch.cuda.get_device_capability(device),
        )
        return False
    return True


@cache
def has_one_bit_kernel(device: torch.device) -> bool:
    """Whether the kernel for few tokens works on this device, found by running it against the reference.

    Its input operand relies on which lane of a warp holds which element. A wrong answer or a failure to compile is told
    once; the kernels for many tokens then serve few tokens as well.
    """
    if not has_kernels(device) or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) not in ONE_BIT_CAPABILITIES:
        return False
    return _works("one-bit tensor core", 1e-3, _self_check, device)


@cache
def has_half_bits_kernel(device: torch.device) -> bool:
    """Whether the kernel for 5 to 16 tokens works on this device, found as `has_one_bit_kernel` is and told alike."""
    return has_one_bit_kernel(device) and _works("half-bits tensor core", 1e-3, _half_self_check, device)


@cache
def fuses_hadamard(device: torch.device) -> bool:
    """Whether the kernels for few tokens transform their inputs themselves on this device, found and told alike."""
    return (
        FUSE_HADAMARD
        and has_half_bits_kernel(device)
        and _works("fused Hadamard transform", 1e-3, _transform_self_check, device)
    )


@cache
def has_digits_kernel(device: torch.device) -> bool:
    """Whether the kernel for up to 16 tokens as 8-bit integers works on this device, found as the others are."""
    if not has_kernels(device):
        return False
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        if not name.startswith(DIGITS_ARCHITECTURES):
            return False
    return _works("8-bit digits", 1e-3, _digits_self_check, device)


_found_hopper: dict[torch.device, bool] = {}
_finding_hopper = threading.Lock()


def has_hopper_kernel(device: torch.device) -> bool:
    """Whether the fused product of sm_90 works on this device, found and told as `has_one_bit_kernel` is.

    It does with a release of Triton that it was tested with (`HOPPER_TESTED`).

    Asked at every product. While a CUDA graph is captured there is no room to find it out: what is not known counts as
    False then, which is not kept.
    """
    found = _found_hopper.get(device)
    if found is None:
        written = has_kernels(device) and torch.version.hip is None and triton_version() >= HOPPER_TRITON
        written = written and torch.cuda.get_device_capability(device)[0] == 9
        tested = written and triton_version() in HOPPER_TESTED
        if written and not tested and torch.cuda.is_current_stream_capturing():
            return False
        with _finding_hopper:
            found = _found_hopper.get(device)  # another thread may have been here
            if found is None:
                # bfloat16 rounds scales, their sums and results: 4e-3
                found = tested or (written and _works("fused wgmma product", 1e-2, _hopper_self_check, device))
                _found_hopper[device] = found
    return found


def _works(name: str, most: float, check: Callable[[torch.device], float], device: torch.device) -> bool:
    # said only where it takes long enough to look like a hang, which is once: Triton keeps what it compiled on disk
    notice = threading.Timer(2, logger.warning, ["Compiling GPU kernels of packed layers; this takes seconds, once."])
    notice.daemon = True
    notice.start()
    try:
        error = check(device)
    except Exception as failure:  # a Triton without Gluon, or with another form of it, fails in many ways
        logger.warning("The %s kernel does not compile here (%s); using the others%s", name, failure, _advice())
        return False
    finally:
        notice.cancel()
    if not error < most:
        logger.warning("The %s kernel is wrong here (relative error %.1e); using the others%s", name, error, _advice())
        return False
    return True


def _advice() -> str:
    import triton

    return (
        ", which may be slower. Another version of Triton or of the GPU's driver may be right; please report these "
        f"(Triton {triton.__version__}, torch {torch.__version__})."
    )


def _error(multiply: Callable[[], torch.Tensor], expected: torch.Tensor) -> torch.Tensor:
    """The larger relative error of two runs: of Triton's own launch, which compiles, and of a native one, if any."""
    found = torch.stack([multiply().view(expected.shape) for _ in range(2)])
    return ((found.double() - expected).flatten(1).norm(dim=1) / expected.norm()).max()  # NaN where one is


def _self_check(device: torch.device) -> float:
    from . import one_bit, prepack

    packed, x, expected = _check_product(device, 2)
    weight = prepack.prepack(packed)
    return float(_error(lambda: one_bit.decode(x, weight, None, one_bit.DecodeConfig(warps=4)), expected))


def _half_self_check(device: torch.device) -> float:
    """The larger error of both numbers of operands."""
    from . import half_bits, prepack

    errors = []
    for tokens in (5, 16):
        packed, x, expected = _check_product(device, tokens)
        weight = prepack.prepack(packed)
        multiply = partial(half_bits.multiply, x, weight, None, half_bits.HalfConfig(4))
        errors.append(_error(multiply, expected))
    return float(torch.stack(errors).max())  # NaN where one is


def _transform_self_check(device: torch.device) -> float:
    """The larger error of both kernels for few tokens, with a block of 256 columns and one that is left of 64."""
    from ...hadamard import transform
    from . import half_bits, one_bit, prepack

    errors = []
    for tokens in (2, 5):
        packed, x, _ = _check_product(device, tokens)
        packed = replace(packed, permutation=None)
        order = torch.arange(packed.in_features - 1, -1, -1, dtype=torch.int32, device=device)[None]
        sign = (torch.arange(packed.in_features, device=device) // 3 % 2 * 2 - 1).to(torch.int8)
        changed = transform(x.double(), order, sign, 256, backend="reference")
        expected = changed @ packed.unpack().dequantize(torch.float64).T
        weight, change = prepack.prepack(packed), (order, sign, 256)
        if tokens > one_bit.MAX_TOKENS:
            multiply = partial(half_bits.multiply, x, weight, None, half_bits.HalfConfig(4), change=change)
        else:
            multiply = partial(one_bit.decode, x, weight, None, one_bit.DecodeConfig(warps=4), change=change)
        errors.append(_error(multiply, expected))
    return float(torch.stack(errors).max())


def _digits_self_check(device: torch.device) -> float:
    """The larger error of one token of whole tiles, and of sixteen where the last one is narrow and sums have parts."""
    from . import digits
    from .gemm_config import GemmConfig
    from .launch import tensor_class

    errors = []
    for tokens, columns, config in (
        (1, 512, GemmConfig("digits", 1, 64, 4, 3, 1, 4)),
        (16, 320, GemmConfig("digits", 16, 64, 4, 3, 2, 2)),
    ):
        packed, x, expected = _check_product(device, tokens, columns)
        kind = tensor_class(x)
        with torch.cuda.device(device):
            plan = digits.DigitsPlan(packed, tokens, columns, kind, torch.float32, None, device, config)
            errors.append(_error(partial(plan.run, x, None), expected))
    return float(torch.stack(errors).max())  # NaN where one is


def _hopper_self_check(device: torch.device) -> float:
    """The larger error of both kernels of `hopper_kernels.py`, each with a dtype and a number of planes of its own.

    Cut as the table of an H200 has it most often, so that calls need the same programs: tiles at the edges are part of
    the output, parts of K are not alike, and the ring of slots is filled more than once. Four are compiled.
    """
    from .gemm_config import GemmConfig
    from .hopper_check import error

    # the kernel whose warps share all roles: x in the weight's order, scaled before; parts, and the launch that adds
    shared = GemmConfig("hopper", 16, 64, 4, 3, 2, 2)
    packed, x, expected = _check_product(device, 23, 2176, rows=272, planes=1, dtype=torch.float16)
    first = error(packed, x, expected, shared)
    # the one with a warp that copies: x as it is, column scales in the kernel
    split = GemmConfig("hopper", 256, 128, 8, 3)
    packed, x, expected = _check_product(device, 300, 2176, rows=272, dtype=torch.bfloat16, permuted=False)
    second = error(packed, x, expected, split)
    return float(torch.stack([first, second]).max())  # NaN where one is


def _check_product(
    device: torch.device,
    tokens: int,
    columns: int = 320,
    *,
    rows: int = 96,
    planes: int = 2,
    dtype: torch.dtype = torch.float32,
    permuted: bool = True,
) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """A random weight, inputs of this dtype and their product in float64.

    The product is computed on the CPU: cuBLAS refuses it where torch was asked for deterministic algorithms.
    """
    blocks = -(-columns // 128)
    generator = torch.Generator().manual_seed(0)
    # whatever torch's defaults are: a model may be built under others, and the answer is kept for the process
    choices: dict[str, Any] = {"generator": generator, "device": "cpu"}
    floating: dict[str, Any] = {**choices, "dtype": torch.float32}
    weight = BinarizedWeight(
        planes_layout(planes, col_scale=True),
        128,
        torch.rand(planes, rows, columns, **floating) < 0.5,
        torch.rand(rows, blocks, planes, **floating) + 0.5,
        torch.rand(planes, columns, **floating) + 0.5,
        torch.randperm(columns, **choices) if permuted else None,
    )
    tensors = pack(weight)
    x = torch.randn(tokens, columns, **floating).to(dtype)
    dense = PackedWeight(weight.layout, 128, columns, **tensors).unpack().dequantize(torch.float64)
    packed = PackedWeight(weight.layout, 128, columns, **{name: each.to(device) for name, each in tensors.items()})
    return packed, x.to(device), (x.double() @ dense.T).to(device)
