"""What becomes of objects and their tensors on the way to another process; all in one process."""

from __future__ import annotations

import torch
from torch import nn

from optimum_arb.calibration.ranks import Ranks
from optimum_arb.calibration.sending import _apart, _together, share_modules


def sent(value):
    data, forms, memory = _apart(value)
    assert all(one.is_contiguous() for one in memory)
    return data, _together(
        data, forms, [form.empty(torch.device("cpu")).copy_(one) for form, one in zip(forms, memory, strict=True)]
    )


def test_tensors_keep_their_values_and_their_layout():
    wide = torch.randn(6, 4, dtype=torch.float64)
    values = {
        "rows": wide,
        "columns": wide.T,
        "part": wide[:, 1:3],
        "bfloat16": wide.bfloat16(),
        "bool": wide > 0,
        "empty": wide[:0, :0],
        "one": wide[0, 0],
    }
    _, found = sent(values)
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
        if name not in ("part", "empty"):  # a part comes without the memory around it
            assert found[name].stride() == value.stride(), name


def test_a_module_comes_whole_and_its_tensors_are_not_pickled():
    module = nn.Linear(512, 4)
    module.weight.requires_grad_(False)
    module.weight.note = "kept"
    module.again = module.weight
    module.register_buffer("beside", torch.arange(3), persistent=False)
    module.bias = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)
    data, found = sent((module, {"method": "arb-hrc"}))
    assert len(data) < 2000
    assert found[1] == {"method": "arb-hrc"}
    assert torch.equal(found[0].weight, module.weight)
    assert isinstance(found[0].weight, nn.Parameter)
    assert not found[0].weight.requires_grad
    assert found[0].weight.note == "kept"
    assert found[0].again is found[0].weight
    assert torch.equal(found[0].beside, module.beside)
    assert "beside" not in found[0].state_dict()
    assert found[0].bias.is_meta


def test_one_process_keeps_its_modules():
    modules = {"linear": nn.Linear(2, 2)}
    assert share_modules(Ranks(), modules, torch.device("cpu"), {}) is modules
