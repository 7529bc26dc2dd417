"""Calibration and fit on several processes, one for each GPU of a host or of several, through torch.distributed.

    torchrun --nproc-per-node 2 -m optimum_arb quantize MODEL OUT --device-map cuda

Every rank walks over the whole model, with its share of the batches: what it computes of a layer are its batches'
products, which are summed over the ranks (`gathering`), and the fit of its share of the layer's linears, which the
ranks exchange packed (`sending`). What fits make of a large calibration matrix is divided as well (`division`). So
every rank ends with the same binarized model, and it is the one that a single process makes.

Here is how a run starts and ends: its `Ranks` (`ranks`), the GPU of each, and what tells whether all have one model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .ranks import TIMEOUT, Ranks
from .standard_output import to_standard_error

_current: ContextVar[Ranks | None] = ContextVar("optimum_arb_ranks", default=None)


def current_ranks() -> Ranks:
    """The ranks of the `distributed` context that is open; this process alone without one."""
    return _current.get() or Ranks()


def started_by_torchrun() -> int:
    """How many processes torchrun (or another launcher that sets its variables) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def distributed(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Inside this context, the processes that torchrun started binarize a model together.

        with distributed() as ranks:
            model = AutoModelForCausalLM.from_pretrained(name, quantization_config=ARBConfig(), device_map="cuda")
            if ranks.is_first:
                model.save_pretrained(out)

    All processes must do the same; each has the whole binarized model at the end. Without torchrun, or with one
    process, nothing is different.

    Args:
        timeout: seconds that a rank waits for the others before it gives up.

    Raises:
        OtherRankFailed: another rank failed; its own error is raised there.
        ValueError: there are more processes on this host than GPUs, or the timeout is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds.")
    size = started_by_torchrun()
    if size == 1 or _current.get() is not None:
        yield _current.get() or Ranks()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    own = not dist.is_initialized()
    with to_standard_error():
        if own:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        one_host = os.environ.get("LOCAL_WORLD_SIZE", str(size)) == str(size)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_rank, timeout, one_host)
    token = _current.set(ranks)
    bars = is_progress_bar_enabled()
    if not ranks.is_first:
        disable_progress_bar()
    try:
        yield ranks
        ranks.exchange(None, "ending")
    except BaseException as error:
        ranks.tell(error)
        raise
    finally:
        _current.reset(token)
        if bars:
            enable_progress_bar()
        if own:
            dist.destroy_process_group()


def local_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of its kind that is this rank's; of several GPUs, it becomes the current one, which kernels run on.

    Raises:
        ValueError: this host has fewer of them than processes.
    """
    if ranks.size == 1 or device.type == "cpu":
        return device
    count = torch.accelerator.device_count()
    if ranks.local_rank >= count:
        raise ValueError(
            f"Process {ranks.local_rank} of this host has no GPU of its own: there are {count}. Start at most "
            f"{count} processes: torchrun --nproc-per-node {count}."
        )
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    return torch.device(device.type, ranks.local_rank)


def model_fingerprint(model: nn.Module) -> str:
    """Tells models apart: a hash of the names, shapes and dtypes of all tensors, and of the first numbers of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:
                first = tensor.detach().reshape(-1)[:64].cpu().contiguous()
                digest.update(first.view(torch.uint8).numpy().tobytes() if first.numel() else b"")
    return digest.hexdigest()
