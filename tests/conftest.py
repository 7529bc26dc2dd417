"""Makes the helpers beside this file importable from every test; no test reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidiactl"):
    # before triton is imported, which transformers and torch do: its kernels run in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two processes of two OpenMP threads each on two cores wait for each other most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
