"""The operator for several packed weights of one input."""

import pytest
import torch
from packed_weights import random_packed, relative_error

from optimum_arb.format.hadamard import random_signs
from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.format.packing import TENSOR_NAMES
from optimum_arb.ops.shared_input import packed_weights, split_results

LAYOUTS = {layout.name: layout for layout in all_layouts()}
ROWS = (42, 7, 16)


def operands(weights, bias=None, backend="auto") -> tuple:
    lists = [[getattr(w, name) for w in weights if getattr(w, name) is not None] for name in TENSOR_NAMES]
    return (*lists, bias, weights[0].layout.name, weights[0].block_size, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["planes-1", "planes-2-col", "groups-all-salient-mean"])
def test_opcheck(name, dtype):
    weights = [random_packed(LAYOUTS[name], rows, 200, permuted=True, seed=rows) for rows in ROWS]
    for x, bias in ((torch.randn(1, 200), None), (torch.randn(2, 1, 200), torch.randn(sum(ROWS)).to(dtype))):
        torch.library.opcheck(
            torch.ops.optimum_arb.shared_input_linear.default, (x.to(dtype), *operands(weights, bias))
        )


def test_results_one_after_another():
    weights = [random_packed(planes_layout(2, col_scale=True), rows, 200, seed=rows) for rows in ROWS]
    x, bias = torch.randn(2, 2, 200), torch.randn(sum(ROWS))
    out = torch.ops.optimum_arb.shared_input_linear(x, *operands(weights, bias))
    assert out.shape == (4 * sum(ROWS),)
    results = split_results(out, x.shape[:-1], ROWS)
    for part, packed, added in zip(results, weights, bias.split(ROWS), strict=True):
        assert part.shape == (2, 2, packed.out_features)
        assert part.is_contiguous()
        expected = x.double() @ packed.unpack().dequantize(torch.float64).T + added
        assert relative_error(part, expected) < 2e-6


@pytest.mark.parametrize("permuted", [False, True])
def test_an_input_that_is_transformed_first(permuted):
    weights = [random_packed(planes_layout(2, col_scale=True), rows, 200, seed=rows) for rows in ROWS]
    x, bias = torch.randn(2, 2, 200), torch.randn(sum(ROWS))
    sign = random_signs(200, 1).to(torch.int8) * 2 - 1
    order = torch.randperm(200).to(torch.int16)[None] if permuted else None
    call, given = torch.ops.optimum_arb.shared_input_linear, operands(weights, bias)
    out = call(x, *given, order, sign, 128)
    assert torch.equal(out, call(torch.ops.optimum_arb.hadamard(x, order, sign, 128, False, "auto"), *given))
    torch.library.opcheck(call.default, (x, *given, order, sign, 128))


def test_lists_of_tensors_and_weights():
    """Of a layout with all seven kinds and of one with two: a kind that is not there is an empty list."""
    for name in ("groups-all-salient-col", "planes-1"):
        weights = [random_packed(LAYOUTS[name], rows, 200, permuted=name != "planes-1") for rows in ROWS]
        lists = operands(weights)[: len(TENSOR_NAMES)]
        assert all(len(tensors) in (0, 3) for tensors in lists)
        assert [len(tensors) for tensors in lists].count(0) == (0 if name != "planes-1" else 5)
        found = packed_weights(200, name, 128, *lists)
        assert [(each.layout, each.block_size, each.in_features) for each in found] == [(LAYOUTS[name], 128, 200)] * 3
        for one, other in zip(found, weights, strict=True):  # Python 3.14 no longer asks first whether they are one
            assert all(getattr(one, kind) is getattr(other, kind) for kind in TENSOR_NAMES)


def test_bad_arguments():
    weights = [random_packed(planes_layout(1), rows, 128) for rows in ROWS]
    x = torch.randn(1, 128)
    call = torch.ops.optimum_arb.shared_input_linear
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        call(x, *operands(weights, backend="fast"))
    with pytest.raises(ValueError, match=r"backend='triton' does not run on cpu: it needs Triton and a GPU"):
        call(x, *operands(weights, backend="triton"))
    for backend in ("cpu:batch-invariant", "reference:batch-invariant", "auto:batch-invariant"):
        with pytest.raises(ValueError, match=rf"backend='{backend}' is a choice of the GPU kernels.*are on cpu"):
            call(x, *operands(weights, backend=backend))
    with pytest.raises(ValueError, match="does not run on cpu"):
        call(x, *operands(weights, backend="triton:batch-invariant"))
    with pytest.raises(ValueError, match=r"input has 256 features.*needs torch.uint8 \[out_features, 32\]"):
        call(torch.randn(1, 256), *operands(weights))
