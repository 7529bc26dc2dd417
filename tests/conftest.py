"""Makes the helpers beside this file importable from every test; no test reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two processes of two OpenMP threads each on two cores wait for each other most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
