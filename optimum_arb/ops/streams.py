"""What is computed once on one stream of a GPU, and read on any stream afterwards."""

from __future__ import annotations

import torch


def finish(device: torch.device) -> None:
    """Waits until the current stream of this device has done what it was asked for.

    To be called before what it makes is kept for all streams, which would not wait for it. Does nothing on other
    devices than CUDA's, while a CUDA graph is recorded, and in code that is being compiled.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return
    torch.cuda.current_stream(device).synchronize()
