"""Every backend against the reference in float64: the worst error over layouts, shapes, dtypes and numbers of tokens.

    python benchmarks/agreement.py                              # what runs on this machine's CPU
    TRITON_INTERPRET=1 python benchmarks/agreement.py --triton  # and Triton's kernels in its interpreter
    python benchmarks/agreement.py --device cuda --workers 12   # and on a GPU, a layout a process

An error is `|y - y64|` over the sum of the absolute products `|x| |W|^T + |bias|` of that output, in units of the
machine epsilon of y's dtype: half of it is the rounding of y alone where nothing cancels. Scales are random around 1,
some negative; columns are permuted in half of the shapes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from optimum_arb.format.layout import Layout, all_layouts
from optimum_arb.format.packing import TENSOR_NAMES, BinarizedWeight, block_count, pack
from optimum_arb.ops.backends import cpu, reference
from optimum_arb.ops.backends.cpu import native
from optimum_arb.ops.backends.packed import PackedWeight

LAYOUTS = tuple(layout.name for layout in all_layouts())
# out_features, in_features, block_size, permuted
SHAPES = (
    (1, 64, 64, False),
    (6, 100, 128, True),
    (42, 192, -1, False),
    (43, 192, 64, True),
    (123, 576, 128, False),
    (9, 576, 256, True),
    (5, 4304, 128, True),
)
TOKENS = (1, 2, 4, 5, 17, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Linear = Callable[[torch.Tensor, PackedWeight, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to compute: its name, the function, its device, and the dtypes that it takes."""

    name: str
    linear: Linear
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass
class Worst:
    """The largest error of a backend at a dtype, in units of the dtype's epsilon, where it was met, and in how many."""

    backend: str
    dtype: torch.dtype
    error: float = 0.0
    where: str = ""
    products: int = 0


def random_packed(layout: Layout, rows: int, columns: int, block_size: int, permuted: bool, seed: int) -> PackedWeight:
    """Random signs and scales, a tenth of the columns salient where the layout has such."""
    generator = torch.Generator().manual_seed(seed)

    def signs(planes: int, width: int) -> torch.Tensor | None:
        return torch.rand(planes, rows, width, generator=generator) < 0.5 if planes else None

    def scales(*shape: int) -> torch.Tensor | None:
        return torch.randn(*shape, generator=generator) * 0.5 + 1 if shape[0] else None

    salient = max(1, columns // 10)
    every, row_scale = signs(layout.planes, columns), scales(rows, block_count(columns, block_size), layout.row_scales)
    assert every is not None
    assert row_scale is not None
    chosen = torch.randperm(columns, generator=generator)[:salient].sort().values
    weight = BinarizedWeight(
        layout=layout,
        block_size=block_size,
        signs=every,
        row_scale=row_scale,
        col_scale=scales(layout.col_scales, columns),
        permutation=torch.randperm(columns, generator=generator) if permuted else None,
        salient_columns=chosen if layout.salient else None,
        salient_signs=signs(layout.salient_planes, salient),
        salient_col_scale=scales(layout.salient_col_scales, salient),
    )
    return PackedWeight(layout, block_size, columns, **pack(weight))


@contextmanager
def plain_torch() -> Iterator[None]:
    """The CPU backend as it is where the native extension was not built."""
    before = native.load
    native.load = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.load = before


def _fallback(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    with plain_torch():
        return cpu.linear(x, packed, bias)


def backends(device: str = "cpu", triton: bool = False) -> list[Backend]:
    """What this machine has: the reference, the CPU backend, each of its native kernels, its fall-back in plain torch,
    and, if asked, Triton's kernels in the interpreter or on a GPU."""
    found = [Backend("reference", reference.linear), Backend("cpu: its choice", cpu.linear)]
    for kernel in native.kernels():

        def with_kernel(x, packed, bias, kernel=kernel):
            return native.linear(x, packed, bias, kernel)

        found.append(Backend(f"cpu: {kernel}", with_kernel))
    found.append(Backend("cpu: plain torch", _fallback))
    if device != "cpu":
        from optimum_arb.ops.backends.triton import dispatch, few_tokens

        def on_gpu(x, packed, bias):
            if x.dtype != torch.float32:
                few_tokens.prepare([packed])
            return dispatch.linear(x, packed, bias)

        def batch_invariant(x, packed, bias):
            return dispatch.linear(x, packed, bias, batch_invariant=True)

        found.append(Backend("reference, GPU", reference.linear, device))
        found.append(Backend("triton: its choice", on_gpu, device))
        found.append(Backend("triton: batch-invariant", batch_invariant, device))
    elif triton:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("Triton's kernels run on a CPU in its interpreter alone: set TRITON_INTERPRET=1.")
        _mend_interpreter()
        from optimum_arb.ops.backends.triton.gemm import gemm
        from optimum_arb.ops.backends.triton.gemm_config import GemmConfig

        for kernel in ("portable", "dequantize"):

            def interpreted(x, packed, bias, config=GemmConfig(kernel, block_m=32, block_n=32)):  # noqa: B008
                return gemm(x, packed, bias, config=config)

            found.append(Backend(f"triton: {kernel}, interpreted", interpreted))
    return found


def _mend_interpreter() -> None:
    """What its releases do not do: 3.6 turns arrays of one element into integers in a way that numpy 2.4 refuses, for
    `range` of a value; 3.9 makes integers of a comparison of scalars in a block, and refuses them as a mask."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        original(tensor, *scope)
        if scope:  # Triton 3.4 gives none
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, *args):
        made = splat(self, *args)
        if args[-1].data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    if original.__name__ != "patch":
        interpreter._patch_lang_tensor = patch
        interpreter.InterpreterBuilder.create_splat = create_splat


def measure(
    found: Sequence[Backend],
    layouts: Sequence[str] = LAYOUTS,
    shapes: Sequence[tuple[int, int, int, bool]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
) -> list[Worst]:
    """The worst error of each backend at each dtype over the grid."""
    return worst_of(measure_layout(found, name, seed, shapes, tokens) for seed, name in enumerate(layouts))


def measure_layout(
    found: Sequence[Backend],
    name: str,
    seed: int,
    shapes: Sequence[tuple[int, int, int, bool]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
) -> list[Worst]:
    """The same of one layout, its weights from a seed of its own."""
    worst = {(backend.name, dtype): Worst(backend.name, dtype) for backend in found for dtype in backend.dtypes}
    layout = next(layout for layout in all_layouts() if layout.name == name)
    for rows, columns, block_size, permuted in shapes:
        packed = random_packed(layout, rows, columns, block_size, permuted, seed)
        weight = packed.unpack().dequantize(torch.float64)
        moved = {device: _to(packed, device) for device in {backend.device for backend in found}}
        for count in tokens:
            for dtype in DTYPES:
                generator = torch.Generator().manual_seed(count)
                x = torch.randn(count, columns, generator=generator).to(dtype)
                bias = torch.randn(rows, generator=generator).to(dtype)
                expected = reference.linear(x.double(), packed, bias.double())
                size = x.double().abs() @ weight.abs().T + bias.double().abs()
                for backend in found:
                    if dtype not in backend.dtypes:
                        continue
                    y = backend.linear(x.to(backend.device), moved[backend.device], bias.to(backend.device)).cpu()
                    assert y.dtype == dtype
                    error = float(((y.double() - expected).abs() / size).max()) / torch.finfo(dtype).eps
                    entry = worst[backend.name, dtype]
                    entry.products += 1
                    if not error <= entry.error:  # NaN counts as the worst
                        entry.error = error
                        entry.where = f"{name}, {rows} x {columns}, block {block_size}, {count} tokens"
    return list(worst.values())


def worst_of(measured: Iterable[list[Worst]]) -> list[Worst]:
    """One entry of each backend and dtype: the worst of several layouts', and how many products all had."""
    result: dict[tuple[str, torch.dtype], Worst] = {}
    for entry in itertools.chain.from_iterable(measured):
        so_far = result.setdefault((entry.backend, entry.dtype), replace(entry, products=0))
        so_far.products += entry.products
        if not entry.error <= so_far.error:
            so_far.error, so_far.where = entry.error, entry.where
    return list(result.values())


def _measure_alone(device: str, triton: bool, name: str, seed: int) -> list[Worst]:
    """A layout, in a process of its own."""
    torch.set_num_threads(1)
    return measure_layout(backends(device, triton), name, seed)


def _to(packed: PackedWeight, device: str) -> PackedWeight:
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    return replace(packed, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Every backend against the reference in float64.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--triton", action="store_true", help="Triton's kernels in its interpreter too; minutes")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--workers", type=int, default=0, help="processes that measure layouts, of one thread each")
    args = parser.parse_args()
    layouts = args.layouts.split(",")
    if args.workers:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, context) as pool:
            under_way = [
                pool.submit(_measure_alone, args.device, args.triton, name, seed) for seed, name in enumerate(layouts)
            ]
            found = worst_of(each.result() for each in under_way)
    else:
        found = measure(backends(args.device, args.triton), layouts)
    kernels = ", ".join(native.kernels()) or "none"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, native kernels: {kernels}")
    print("| backend | dtype | worst error, epsilons of the dtype | met at | products |")
    print("|---|---|---|---|---|")
    for entry in found:
        dtype = str(entry.dtype).removeprefix("torch.")
        print(f"| {entry.backend} | {dtype} | {entry.error:.2f} | {entry.where} | {entry.products} |")


if __name__ == "__main__":
    main()
