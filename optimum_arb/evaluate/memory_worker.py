"""The process in which `memory.measure_memory` loads a model."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """See `memory.measure_memory`, which also says what `options` are."""
    import torch

    from ..commands.loading import load_model
    from .latency import generate, random_prompt

    if torch.cuda.is_available():
        torch.cuda.init()
    torch.ones(64, 64) @ torch.ones(64, 64)  # the threads and buffers of the first product are not the model's
    gc.collect()
    _forget_peak()
    before, private_before = resident_bytes(), private_bytes()
    start = time.perf_counter()
    model = load_model(options["name"], options["dtype"], options["device_map"], options["backend"])
    seconds = time.perf_counter() - start
    peak_loading = peak_bytes()
    resettable = _forget_peak()
    prompt = random_prompt(model, 1, options["prompt_tokens"])
    generate(model, prompt, options["new_tokens"])
    peak = peak_bytes()
    gc.collect()
    private = private_bytes()
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return {
        "parameters": sum(tensors.values()),
        "resident": resident_bytes() - before,
        "private": None if private is None or private_before is None else private - private_before,
        "peak_loading": peak_loading - before if resettable else None,
        "peak": max(peak, peak_loading) - before,
        "gpu_resident": sum(torch.cuda.memory_allocated(gpu) for gpu in gpus) if gpus else None,
        "gpu_peak": sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) if gpus else None,
        "prompt_tokens": options["prompt_tokens"],
        "new_tokens": options["new_tokens"],
        "seconds": seconds,
    }


def resident_bytes() -> int:
    """The process's resident memory."""
    import psutil

    return psutil.Process().memory_info().rss


def private_bytes() -> int | None:
    """Of it, the pages that belong to this process alone; None where the system does not tell."""
    import psutil

    try:
        return psutil.Process().memory_full_info().uss or None
    except (psutil.Error, OSError, AttributeError):
        return None


def peak_bytes() -> int:
    """The most resident memory since the process began, or since `_forget_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        match = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _forget_peak() -> bool:
    """Sets the mark of the peak back (Linux); whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    # only the result may reach stdout, and it must come last
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(measure(json.loads(sys.argv[1]))), file=out, flush=True)
