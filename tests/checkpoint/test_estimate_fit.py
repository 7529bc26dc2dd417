"""What a fit is said to hold, against the bytes of all tensors in one."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_arb import ARBConfig
from optimum_arb.algorithms import admm
from optimum_arb.checkpoint import estimate_fit
from optimum_arb.checkpoint.estimate_fit import fit_memory
from optimum_arb.conversion import binarize_linear


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._known.discard(key)
        self.now -= size


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 704), (704, 256)])
@pytest.mark.parametrize(
    "choices",
    [
        {"admm_iterations": 3},
        {"admm_iterations": 3, "planes": 2},
        {"admm_iterations": 3, "hadamard": 128},
        {"admm_iterations": 0, "planes": 2},
        {"block_size": -1, "admm_iterations": 3},
        {"method": "arb-dbf", "num_iterations": 2},
        {"method": "arb-rc", "num_iterations": 1},
        {"method": "rtn"},
        {"dataset": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fit_holds_what_is_said(one_thread, rows, columns, choices, dtype, monkeypatch):
    """Products in bfloat16, as on a CPU with AMX, and in float32."""
    for module in (admm, estimate_fit):
        monkeypatch.setattr(module, "product_dtype", lambda device: dtype)
    config = ARBConfig(**{"dataset": ["text"], **choices})
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(columns, rows, bias=False)
    module.weight.data = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(1024, columns, generator=generator)
    hessian = None if config.dataset is None else inputs.T @ inputs
    with Held() as held:
        binarize_linear("it", module, config, hessian, len(inputs))
    said = fit_memory(rows, columns, config, hessian is not None, torch.device("cpu"))
    assert 0.85 * held.most < said < 1.5 * held.most
