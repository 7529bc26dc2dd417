"""What `from_pretrained` takes for a model on disk: its files in the page cache, or not."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_arb.stored.checksums import SKIP_VARIABLE


def write(model: PreTrainedModel, directory: Path) -> tuple[int, float]:
    """Saves a model in files of at most 5 GB, and waits until they are on the disk.

    Returns:
        Bytes in the directory, and seconds.

    Raises:
        OSError: the disk has too little room; nothing is written then.
    """
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if needed * 1.02 > free:
        raise OSError(
            f"{directory}: {needed / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} are free. Choose another disk."
        )
    start = time.perf_counter()
    model.save_pretrained(directory, max_shard_size="5GB")
    for file in directory.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return sum(file.stat().st_size for file in directory.iterdir()), time.perf_counter() - start


def load(directory: Path, device: str, verified: bool = True) -> tuple[Any, float]:
    """Loads a model in bfloat16.

    Args:
        directory: where it lies.
        device: where it goes.
        verified: whether the checksums of a packed model are compared.

    Returns:
        The model, and the seconds of `from_pretrained`, until it is complete on the device.
    """
    os.environ[SKIP_VARIABLE] = "0" if verified else "1"
    free_memory()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map={"": device}, dtype=torch.bfloat16, local_files_only=True
    )
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return model, time.perf_counter() - start


def free_memory() -> None:
    """Gives back what models that are no longer held had, so that the next load has to ask for it anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evict(directory: Path) -> bool:
    """Asks the system to drop a model's files from its page cache.

    Returns:
        Whether they are gone: false too where the system does not say.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in directory.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = cached_share(directory)
    return share is not None and share < 0.02


def cached_share(directory: Path) -> float | None:
    """The share of a model's weights that is in the page cache, by mincore(2); None where the system does not say."""
    if sys.platform != "linux":
        return None
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    pages = present = 0
    for file in directory.glob("*.safetensors"):
        # a private mapping, since ctypes wants one that it could write to; nothing is read by it
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            view = ctypes.c_char.from_buffer(mapped)
            failed = mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), found)
            del view  # or the mapping could not be closed
            if failed:
                return None
            pages += len(found)
            present += int(torch.frombuffer(found, dtype=torch.uint8).bitwise_and_(1).sum())
    return present / pages if pages else None
