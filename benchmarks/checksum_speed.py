"""What the checksums of a saved model cost, in seconds of the processor.

    python benchmarks/checksum_speed.py                # a file of 512 MiB in a temporary directory

The file is read once before, so that it lies in the system's cache. Where the package xxhash is installed, xxh3 is
timed on the same bytes for comparison.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from optimum_arb.stored.checksums import placeholder, seal, verify

QUANTIZATION = {"quant_method": "arb"}


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The least time of the processor, all threads together."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the checksums of a saved model cost.")
    parser.add_argument("--mebibytes", type=int, default=512)
    args = parser.parse_args()
    count = max(1, args.mebibytes // 16)
    tensors = {f"layers.{index}.weight": torch.randint(256, (4096, 4096), dtype=torch.uint8) for index in range(count)}
    data = tensors["layers.0.weight"].numpy().tobytes()
    print("| | bytes | seconds of the processor | GB/s |")
    print("|---|---|---|---|")

    def row(name: str, size: int, taken: float) -> None:
        print(f"| {name} | {size:,} | {taken:.3f} | {size / taken / 1e9:.2f} |", flush=True)

    row("CRC-32 of zlib", len(data), seconds(lambda: zlib.crc32(data), 10))
    try:
        xxhash = importlib.import_module("xxhash")
        row("xxh3", len(data), seconds(lambda: xxhash.xxh3_64_intdigest(data), 10))
    except ImportError:
        pass
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt", **placeholder(count, QUANTIZATION)})
        del tensors
        size = path.stat().st_size
        path.read_bytes()
        row("sealing a file", size, seconds(lambda: seal([path], QUANTIZATION)))
        row("verifying it", size, seconds(lambda: verify([path], QUANTIZATION)))


if __name__ == "__main__":
    main()
