"""What a rank of a tensor-parallel run keeps of a packed weight. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import tomllib
import torch
from packed_weights import random_binarized, relative_error

from optimum_arb.format.layout import all_layouts, bitmap_layout, planes_layout
from optimum_arb.format.packing import pack, unpack
from optimum_arb.format.slicing import column_obstacle, slice_columns, slice_rows
from optimum_arb.integrations import vllm as plugin
from optimum_arb.nn import ARBLinear

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {layout.name: layout for layout in all_layouts()}


@pytest.mark.parametrize("block_size", [64, 128, -1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_of_the_packed_weight_are_columns_of_the_weight(name, block_size):
    """The parts are packed weights of the same layout, and sum up to the whole product."""
    layout, columns, ranks = LAYOUTS[name], 512, 2
    tensors = pack(random_binarized(layout, 24, columns, block_size))
    whole = unpack(tensors, layout, columns, block_size).dequantize()
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    assert column_obstacle(tensors, columns, block_size, ranks) is None
    total = torch.zeros(3, 24)
    for rank in range(ranks):
        start, stop = rank * columns // ranks, (rank + 1) * columns // ranks
        part = unpack(
            slice_columns(tensors, layout, columns, block_size, start, stop), layout, stop - start, block_size
        )
        assert torch.equal(part.dequantize(), whole[:, start:stop])
        total += ARBLinear.from_binarized(part)(x[:, start:stop])
    assert relative_error(total, x @ whole.T) < 1e-5


@pytest.mark.parametrize("block_size", [64, 128, -1])
def test_last_columns_may_end_within_a_block(block_size):
    layout = bitmap_layout("all", True, col_scale=True)
    tensors = pack(random_binarized(layout, 8, 300, block_size))
    whole = unpack(tensors, layout, 300, block_size).dequantize()
    part = slice_columns(tensors, layout, 300, block_size, 128, 300)
    assert torch.equal(unpack(part, layout, 172, block_size).dequantize(), whole[:, 128:])


def test_a_part_may_hold_no_salient_column():
    layout = bitmap_layout("none", True, col_scale=True)
    weight = random_binarized(layout, 8, 256, salient=2)
    weight.salient_columns = torch.tensor([3, 100])
    tensors = pack(weight)
    part = slice_columns(tensors, layout, 256, 128, 128, 256)
    assert part["salient_columns"].shape == (1, 0)
    part = unpack(part, layout, 128, 128)
    assert torch.equal(part.dequantize(), unpack(tensors, layout, 256, 128).dequantize()[:, 128:])
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    assert relative_error(ARBLinear.from_binarized(part)(x), x @ part.dequantize().T) < 1e-5


@pytest.mark.parametrize("permuted", [False, True])
def test_rows_of_the_packed_weight_are_rows_of_the_weight(permuted):
    layout = bitmap_layout("all", True, col_scale=True)
    tensors = pack(random_binarized(layout, 24, 300, permuted=permuted))
    rows = torch.tensor([5, 6, 7, 20])
    part = unpack(slice_rows(tensors, rows), layout, 300, 128)
    assert torch.equal(part.dequantize(), unpack(tensors, layout, 300, 128).dequantize()[rows])


@pytest.mark.parametrize(
    ("columns", "block_size", "permuted", "parts", "reason"),
    [
        (512, 128, False, 4, None),
        (512, 64, False, 8, None),
        (512, -1, False, 4, None),
        (512, 128, True, 2, "order of activation"),
        (512, 256, False, 4, "blocks of 256"),
        (512, -1, False, 8, "blocks of 128"),
        (320, 64, False, 2, "blocks of 64"),
        (384, 128, False, 5, "blocks of 128"),
    ],
)
def test_what_cannot_be_cut_is_said(columns, block_size, permuted, parts, reason):
    layout = planes_layout(2, col_scale=True)
    tensors = pack(random_binarized(layout, 4, columns, block_size, permuted=permuted))
    obstacle = column_obstacle(tensors, columns, block_size, parts)
    if reason is None:
        assert obstacle is None
        return
    assert reason in obstacle
    with pytest.raises(ValueError, match="cannot be cut"):
        slice_columns(tensors, layout, columns, block_size, columns // parts, 2 * columns // parts)


def test_the_plugin_imports_nothing_of_vllm_and_registers_twice(caplog):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"optimum_arb": f"{plugin.__name__}:register"}
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    installed = importlib.util.find_spec("vllm") is not None
    assert bool(caplog.records) != installed
    if not installed:
        assert "vLLM" in caplog.text
