from __future__ import annotations

import pytest
import torch

from optimum_arb.ops.backends.triton.sums import Parts, Sum


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("stride", [None, 42, 100])
@pytest.mark.parametrize("split_k", [2, 3])
def test_sum(split_k, stride, with_bias):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(split_k, 19, 42, generator=generator)
    bias = torch.randn(42, generator=generator).half() if with_bias else None
    out = torch.full((19, stride or 42), float("nan"), dtype=torch.float16)
    Sum([Parts(split_k, 42, bias, stride)], 19, out.dtype, out.device)((parts, bias, out))
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    if bias is not None:
        expected += bias.float()
    assert torch.equal(out[:, :42], expected.half())
    assert out[:, 42:].isnan().all(), "written behind its rows"
