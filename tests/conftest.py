"""Makes the helpers beside this file importable from every test; no test reaches the network.

Each test draws the same numbers whichever tests ran before it.
"""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidiactl"):
    # before triton is imported, which transformers and torch do: its kernels run in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two processes of two OpenMP threads each on two cores wait for each other most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begins torch's own generators anew, before the fixtures of a test, those of a module or a session among them.

    Which tests a process of `pytest -n 2` has run before is a matter of time: what a test drew without a seed of its
    own was another number in every run, and a comparison near its limit failed in some of them.
    """
    import torch  # behind the variables above

    torch.manual_seed(0)
