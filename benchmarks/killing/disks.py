"""Disks of any size, in memory: tmpfs, where this user may mount one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def mount(path: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", str(path)], check=True)  # a model that was loaded from there may still be mapped


def remove(path: Path) -> None:
    """Everything of a trial."""
    for place in (path, path.parent):
        if os.path.ismount(place):
            unmount(place)
    shutil.rmtree(path.parent)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    try:
        mount(folder, 1 << 16)
    except (OSError, subprocess.CalledProcessError):
        return False
    unmount(folder)
    return True
