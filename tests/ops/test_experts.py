"""The operator of experts: reference and CPU backends, registration, gradients, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from packed_weights import random_binarized, relative_error

from optimum_arb.experts.packing import PackedForm, expert_dequantized, expert_part, stack_experts
from optimum_arb.format.layout import all_layouts, bitmap_layout, planes_layout
from optimum_arb.format.packing import TENSOR_NAMES, pack
from optimum_arb.ops import experts as experts_module
from optimum_arb.ops import grouped_linear

LAYOUTS = {layout.name: layout for layout in all_layouts()}
ROWS, COLUMNS = 12, 200


def random_experts(layout, experts=3, parts=2, block_size=64, permuted=True, columns=COLUMNS):
    """Packed experts of `[12, columns]`, and their weights in float64."""
    weights = [
        [
            random_binarized(layout, ROWS // parts, columns, block_size, permuted=permuted, seed=10 * e + p)
            for p in range(parts)
        ]
        for e in range(experts)
    ]
    tensors = stack_experts([[pack(weight) for weight in own] for own in weights])
    form = PackedForm(layout, block_size, experts, parts, ROWS, columns)
    dense = torch.stack([expert_dequantized(tensors, form, e, torch.float64) for e in range(experts)])
    return tensors, form, dense


def run(x, offsets, tensors, form, backend="auto"):
    choices = {"layout": form.layout.name, "block_size": form.block_size, "parts": form.parts}
    return grouped_linear(x, offsets, **tensors, **choices, backend=backend)


def by_hand(x, offsets, dense):
    """Row by row, in float64."""
    out = torch.zeros(len(x), dense.shape[1], dtype=torch.float64)
    for row in range(len(x)):
        owners = [e for e in range(len(dense)) if row < offsets[e]]
        if owners:
            out[row] = dense[owners[0]] @ x[row].double()
    return out


def arguments(tensors, form, backend="auto") -> tuple:
    return (
        *(tensors.get(name) for name in TENSOR_NAMES),
        form.layout.name,
        form.block_size,
        form.parts,
        backend,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_row_meets_its_expert(name, backend):
    tensors, form, dense = random_experts(LAYOUTS[name])
    x = torch.randn(20, COLUMNS)
    # one expert with a single row, one with many, and three rows of none
    offsets = torch.tensor([1, 1, 17])
    result = run(x, offsets, tensors, form, backend)
    assert relative_error(result, by_hand(x, offsets, dense)) < 1e-5
    assert torch.equal(result[17:], torch.zeros(3, ROWS))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts_and_dtypes(parts, dtype, backend):
    tensors, form, dense = random_experts(planes_layout(2, col_scale=True), parts=parts)
    x = torch.randn(9, COLUMNS).to(dtype)
    offsets = torch.tensor([4, 6, 9], dtype=torch.int32)
    result = run(x, offsets, tensors, form, backend)
    assert result.dtype == dtype
    assert relative_error(result, by_hand(x, offsets, dense)) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(
        dtype, 2e-2 if dtype == torch.bfloat16 else 2e-3
    )


def test_no_rows_and_no_tokens_for_anyone():
    tensors, form, _ = random_experts(planes_layout(1))
    assert run(torch.randn(0, COLUMNS), torch.tensor([0, 0, 0]), tensors, form).shape == (0, ROWS)
    assert not run(torch.randn(4, COLUMNS), torch.tensor([0, 0, 0]), tensors, form).any()


def test_experts_without_rows_are_not_looked_at():
    tensors, form, _ = random_experts(planes_layout(1))
    x, offsets = torch.randn(4, COLUMNS), torch.tensor([2, 2, 4])
    expected = run(x, offsets, tensors, form)
    tensors["row_scale"][1] = torch.nan
    assert torch.equal(run(x, offsets, tensors, form), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_input(backend, dtype):
    tensors, form, dense = random_experts(bitmap_layout("all", True, True))
    x = torch.randn(8, COLUMNS, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([3, 3, 7])
    grad = torch.randn(8, ROWS, dtype=dtype)
    run(x, offsets, tensors, form, backend).backward(grad)
    expected = by_hand(grad, offsets, dense.transpose(1, 2))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(x.grad, expected) < bound
    assert not x.grad[7].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_changes_nothing(backend):
    tensors, form, _ = random_experts(bitmap_layout("all", True, True))
    for rows in (8, 80):
        x = torch.randn(rows, COLUMNS, requires_grad=True)
        offsets, results = torch.tensor([rows // 2, rows // 2, rows]), []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = run(x, offsets, tensors, form, backend)
                results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
        assert all(torch.equal(off, on) for off, on in zip(*results, strict=True))


@pytest.mark.parametrize("layout", [planes_layout(1, col_scale=True), bitmap_layout("all", True, True)], ids=str)
def test_opcheck(layout):
    tensors, form, _ = random_experts(layout)
    offsets = torch.tensor([2, 2, 5])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, COLUMNS, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.optimum_arb.grouped_linear.default, (x, offsets, *arguments(tensors, form)))
        *packed, layout_name, block_size, parts, backend = arguments(tensors, form)
        torch.library.opcheck(
            torch.ops.optimum_arb.grouped_linear_input_grad.default,
            (torch.randn(6, ROWS, dtype=dtype), offsets, *packed, layout_name, block_size, parts, COLUMNS, backend),
        )


def test_a_backend_may_bring_its_own(monkeypatch):
    tensors, form, _ = random_experts(planes_layout(1))
    seen = []

    def grouped(name, result):
        def run_it(x, offsets, packed):
            seen.append((name, packed.parts, packed.in_features, offsets.tolist()))
            return x.new_ones(x.shape[0], result)

        return run_it

    own = SimpleNamespace(grouped_linear=grouped("forward", ROWS), grouped_input_grad=grouped("backward", COLUMNS))
    monkeypatch.setattr(experts_module, "_backend", lambda name, device: own)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    run(x, torch.tensor([1, 2, 3]), tensors, form).sum().backward()
    assert seen == [("forward", 2, COLUMNS, [1, 2, 3]), ("backward", 2, COLUMNS, [1, 2, 3])]
    assert torch.equal(x.grad, torch.ones(3, COLUMNS))


def test_bad_arguments():
    tensors, form, _ = random_experts(planes_layout(1))
    x, offsets = torch.randn(4, COLUMNS), torch.tensor([1, 2, 4])
    with pytest.raises(ValueError, match=r"input has 100 features"):
        run(torch.randn(4, 100), offsets, tensors, form)
    with pytest.raises(ValueError, match=r"must be floating \[M, K\]"):
        run(x[None], offsets, tensors, form)
    with pytest.raises(ValueError, match="one integer for each of the 3 experts"):
        run(x, offsets[:2], tensors, form)
    with pytest.raises(ValueError, match="in 5 parts"):
        run(x, offsets, tensors, PackedForm(form.layout, 64, 3, 5, ROWS, COLUMNS))
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        run(x, offsets, tensors, form, backend="fast")


# Stacking


def test_every_expert_is_a_packed_weight_of_its_own():
    layout = bitmap_layout("all", True, True)
    weights = [[random_binarized(layout, 6, COLUMNS, 64, permuted=True, seed=s) for s in (e, e + 9)] for e in range(3)]
    packed = [[pack(weight) for weight in own] for own in weights]
    tensors = stack_experts(packed)
    form = PackedForm(layout, 64, 3, 2, ROWS, COLUMNS)
    salient = weights[0][0].salient_columns.numel()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == form.shapes(permuted=True, salient=salient)
    for expert in range(3):
        for part in range(2):
            own = expert_part(tensors, form, expert, part)
            assert own.keys() == packed[expert][part].keys()
            assert all(torch.equal(own[name], packed[expert][part][name]) for name in own)


def test_stacking_mixes_permutations_and_scale_dtypes():
    layout = planes_layout(1, col_scale=True)
    one = pack(random_binarized(layout, 6, COLUMNS, 64, permuted=True))
    other = pack(random_binarized(layout, 6, COLUMNS, 64, permuted=False, seed=1))
    other["row_scale"] = other["row_scale"].float() * 1e6
    tensors = stack_experts([[one], [other]])
    assert torch.equal(tensors["permutation"][1, 0], torch.arange(COLUMNS, dtype=torch.int16))
    assert tensors["row_scale"].dtype == torch.float32
    assert torch.equal(tensors["row_scale"][0], one["row_scale"].float())
    assert torch.equal(tensors["row_scale"][1], other["row_scale"])


def test_stacking_refuses_different_numbers_of_salient_columns():
    layout = bitmap_layout("none", True, True)
    weights = [[pack(random_binarized(layout, 6, COLUMNS, 64, salient=count))] for count in (3, 5)]
    with pytest.raises(ValueError, match=r"3 to 5 salient columns.*set salient_columns to a number, or to 0"):
        stack_experts(weights)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradient_of_a_gradient(backend):
    tensors, form, dense = random_experts(planes_layout(2, col_scale=True))
    offsets = torch.tensor([3, 3, 7])
    x, upstream = torch.randn(7, COLUMNS, requires_grad=True), torch.randn(7, ROWS, requires_grad=True)
    (grad,) = torch.autograd.grad(run(x, offsets, tensors, form, backend), x, upstream, create_graph=True)
    direction = torch.randn(7, COLUMNS)
    (found,) = torch.autograd.grad(grad, upstream, direction)
    assert relative_error(found, by_hand(direction, offsets, dense)) < 2e-6
