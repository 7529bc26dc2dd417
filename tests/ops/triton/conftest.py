"""Triton's kernels run in its interpreter here, on tensors of the CPU; that must be said before triton is imported."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
