"""Runs a function of a test in several processes that reach each other through torch.distributed.

As a program: `python ranks.py FILE FUNCTION ARGUMENTS`, one process of those that `run_ranks` starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    """That of a process of its own: this checkout comes first, one thread."""
    root = Path(__file__).resolve().parents[1]
    path = [str(root), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    known = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    # gloo asks for the address of this host's name, which a container may not know
    known["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return {**os.environ, **known, **variables}


def run_ranks(
    file: str, function: str, *arguments: Any, ranks: int = 2, timeout: float = 400, **variables: str
) -> list[subprocess.CompletedProcess]:
    """Calls `function(*arguments)` of a file in `ranks` processes.

    Returns:
        What each process returned and printed, in the order of their ranks; their exit codes are not looked at.
    """
    env = environment(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    command = [sys.executable, __file__, file, function, json.dumps([str(argument) for argument in arguments])]
    processes = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    end = time.monotonic() + timeout
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append(subprocess.CompletedProcess(command, process.returncode, out, err))
        return results
    finally:
        for process in processes:
            process.kill()
            process.wait()


def check(results: list[subprocess.CompletedProcess]) -> None:
    """Fails where a process failed, and shows what it said."""
    for rank, result in enumerate(results):
        assert result.returncode == 0, f"rank {rank}:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    getattr(worker, sys.argv[2])(*json.loads(sys.argv[3]))
    import torch.distributed as dist

    if dist.is_initialized():
        # a thread of gloo that drops a tensor while Python ends takes the process with it: "terminate called without an
        # active exception", seen once
        dist.destroy_process_group()
