"""The copy of a weight for the one-bit kernel: its shapes, its order of columns, and how long it is kept."""

import copy
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_weights import random_binarized, random_packed
from torch import nn

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.format.packing import pack
from optimum_arb.nn import ARBLinear
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton import prepack as module
from optimum_arb.ops.backends.triton.prepack import find, join, make, prepack, program

LAYOUTS = {layout.name: layout for layout in all_layouts()}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(module, "_cache", {})
    return module._cache


@pytest.mark.parametrize("name", LAYOUTS)
def test_program(name):
    """What the kernel can do: three words of a tile, three planes in a product, an input for each zone and scale."""
    layout = LAYOUTS[name]
    steps = program(layout)
    assert steps.planes == layout.planes + layout.salient_planes <= 3
    assert steps.row_scales == layout.row_scales
    assert len(set(steps.inputs)) == len(steps.inputs)
    assert len(steps.terms) == len(layout.terms)
    for (mask, row, source, factor), term in zip(steps.terms, layout.terms, strict=True):
        assert {plane for plane in range(3) if mask >> plane & 1} == set(term.planes)
        assert (row, factor) == (term.row, term.factor)
        assert steps.inputs[source] == (-1 if term.col is None else term.col, term.zone)


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "tiles", "tiles_per_block", "blocks"),
    [
        (1, 64, 64, 1, 1, 1),
        (42, 300, 64, 5, 1, 5),
        (32, 300, 128, 3, 1, 3),
        (33, 576, 256, 5, 2, 3),
        (123, 300, -1, 3, 3, 1),
        (2, 3, 128, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-mean"])
def test_shapes(name, rows, columns, block_size, tiles, tiles_per_block, blocks):
    packed = random_packed(LAYOUTS[name], rows, columns, block_size)
    weight = prepack(packed)
    groups = -(-rows // 32)
    planes = packed.layout.planes + packed.layout.salient_planes
    assert weight.words.shape == (groups, tiles, planes, 8, 4, 4)
    assert weight.words.dtype == torch.int32
    assert weight.row_scale.shape == (groups, blocks, packed.layout.row_scales, 8, 4)
    assert weight.row_scale.dtype == packed.row_scale.dtype
    assert weight.input_scale.shape == (len(weight.program.inputs), tiles * 128)
    assert (weight.groups, weight.tiles, weight.rows, weight.tiles_per_block) == (groups, tiles, rows, tiles_per_block)
    for tensor in (weight.words, weight.row_scale, weight.input_scale):
        assert tensor.is_contiguous()
    # the rows that fill the last group, row 8 j + g of a group
    words = weight.words.permute(0, 5, 3, 1, 2, 4).reshape(groups * 32, -1)
    scales = weight.row_scale.permute(0, 4, 3, 1, 2).reshape(groups * 32, -1)
    assert torch.equal(scales[:rows], packed.row_scale)
    assert not words[rows:].any()
    assert not scales[rows:].any()
    assert words[:rows].any(1).all()


def test_whole_tiles_are_the_stored_bytes():
    packed = random_packed(planes_layout(1), 40, 256)
    words = prepack(packed).words  # [2, 2, 1, g, t, j]
    for row in (0, 13, 31, 39):
        found = words[row // 32, :, 0, row % 8, :, row % 32 // 8].numpy().tobytes()
        assert found == packed.weight[row].numpy().tobytes()


def test_word_of_every_column():
    """Column 128 T + 16 g + 4 t + j of the stored order is bit 8 j + g of word t of tile T."""
    signs = torch.zeros(1, 1, 256, dtype=torch.bool)
    for column in (0, 1, 17, 100, 127, 128, 255):
        binarized = random_binarized(planes_layout(1), 1, 256)
        binarized.signs = signs.clone()
        binarized.signs[0, 0, column] = True
        words = prepack(PackedWeight(planes_layout(1), 128, 256, **pack(binarized))).words[0, :, 0, 0, :, 0].numpy()
        inside = column % 128
        expected = np.zeros((2, 4), dtype=np.uint32)
        expected[column // 128, inside % 16 // 4] = 1 << (8 * (inside % 4) + inside // 16)
        assert (words.view(np.uint32) == expected).all()


@pytest.mark.parametrize(
    ("columns", "block_size", "permuted", "natural"),
    [
        (128, 128, False, True),
        (384, -1, False, True),
        (512, 256, False, True),
        (384, 128, True, False),
        (300, 128, False, False),
        (128, 64, False, False),
    ],
)
def test_index_where_the_order_is_not_natural(columns, block_size, permuted, natural):
    packed = random_packed(planes_layout(1), 8, columns, block_size, permuted=permuted)
    weight = prepack(packed)
    assert (weight.index is None) == natural
    if weight.index is None:
        assert (weight.input_scale == 1).all()
        return
    assert weight.index.dtype == torch.int32
    assert weight.index.shape == (weight.tiles * 128,)
    there = weight.input_scale[0] != 0
    assert sorted(weight.index[there].tolist()) == list(range(columns))  # each column once
    assert not weight.index[~there].any()  # an address that may be read


def test_an_identity_permutation_is_natural():
    binarized = random_binarized(planes_layout(1), 8, 256, permuted=True)
    binarized.permutation = torch.arange(256)
    assert prepack(PackedWeight(planes_layout(1), 128, 256, **pack(binarized))).index is None


def test_input_scale_is_the_column_scale_in_its_zone():
    packed = random_packed(LAYOUTS["groups-all-salient-col"], 8, 256, permuted=True)
    weight = prepack(packed)
    salient = torch.zeros(256, dtype=torch.bool)
    salient[packed.salient_columns[0].long()] = True
    stored = torch.arange(256).view(2, 8, 16).flatten()  # whole tiles: slots are stored columns
    assert torch.equal(weight.index.long(), packed.permutation[0].long()[stored])
    for (col, zone), scale in zip(weight.program.inputs, weight.input_scale, strict=True):
        expected = torch.zeros(256)
        if col < 2:
            expected = packed.col_scale[col].float()
        else:
            expected[salient] = packed.salient_col_scale[col - 2].float()
        expected = torch.where(salient if zone == "salient" else ~salient, expected, 0)
        assert torch.equal(scale, expected)


@pytest.mark.parametrize("permuted", [False, True])
def test_join(permuted):
    layout = planes_layout(2, col_scale=True)
    parts = [prepack(random_packed(layout, rows, 256, permuted=permuted, seed=rows)) for rows in (42, 7, 64)]
    joined = join(parts)
    assert joined is not None
    assert joined.rows == 113
    assert joined.groups == 2 + 1 + 2
    assert torch.equal(joined.words[2], parts[1].words[0])
    assert torch.equal(joined.row_scale[3:], parts[2].row_scale)
    assert joined.input_scale.shape == (6, 256)
    assert torch.equal(joined.input_scale[2:4], parts[1].input_scale)
    if permuted:
        assert joined.index.shape == (3, 256)
        assert torch.equal(joined.index[1], parts[1].index)
    else:
        assert joined.index is None


def test_what_does_not_join():
    layout = planes_layout(2, col_scale=True)
    first = prepack(random_packed(layout, 42, 256))
    assert join([first]) is not None
    others = [
        random_packed(planes_layout(2), 42, 256),
        random_packed(layout, 42, 384),
        random_packed(layout, 42, 256, -1),
        random_packed(layout, 42, 256, permuted=True),
        replace(random_packed(layout, 42, 256), row_scale=random_packed(layout, 42, 256).row_scale.float()),
    ]
    for other in others:
        assert join([first, prepack(other)]) is None
        assert join([prepack(other), first]) is None


# The cache


def layer(name="planes-2-col", rows=42, columns=256, **choices) -> ARBLinear:
    return ARBLinear.from_binarized(random_binarized(LAYOUTS[name], rows, columns, **choices))


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("words", "row_scale", "input_scale"))


def test_made_once_and_found(cache):
    module = layer()
    assert find([module.packed_weight()]) is None
    made = make([module.packed_weight()])
    assert same(made, prepack(module.packed_weight()))
    assert make([module.packed_weight()]) is made
    assert find([module.packed_weight()]) is made
    assert len(cache) == 1


def test_several_weights_are_one_entry(cache):
    modules = [layer(seed=seed) for seed in range(3)]
    weights = [module.packed_weight() for module in modules]
    made = make(weights)
    assert made.rows == 126
    assert find(weights) is made
    assert find(weights[:1]) is None
    assert find(weights[::-1]) is None
    del weights
    del modules[1]
    gc.collect()
    assert not cache


def test_what_does_not_fit_together_is_remembered(cache):
    weights = [layer().packed_weight(), layer(columns=384).packed_weight()]
    assert make(weights) is None
    assert len(cache) == 1
    assert make(weights) is None


@pytest.mark.parametrize(
    "name",
    ["weight", "row_scale", "col_scale", "permutation", "salient_columns", "salient_weight", "salient_col_scale"],
)
def test_a_change_in_place_is_seen(name):
    """Of any tensor that the copy was made of."""
    module = layer("groups-all-salient-col", permuted=True)
    before = make([module.packed_weight()])
    with torch.no_grad():
        parameter = module.packed_parameter(name)
        if name in ("weight", "salient_weight"):
            parameter.bitwise_not_()
        elif name == "permutation":
            parameter.copy_(parameter.flip(1))
        elif name == "salient_columns":
            free = (set(range(256)) - set(parameter[0].tolist())).pop()
            parameter[0, 0] = free
            parameter.copy_(parameter.sort().values)
        else:
            parameter.mul_(2)
    assert find([module.packed_weight()]) is None
    after = make([module.packed_weight()])
    assert not (same(before, after) and torch.equal(before.index, after.index))
    assert same(after, prepack(module.packed_weight()))
    assert find([module.packed_weight()]) is after


def test_a_replaced_scale_is_seen():
    module = layer()
    make([module.packed_weight()])
    module.weight_row_scale = nn.Parameter(module.weight_row_scale * 2, requires_grad=False)
    assert find([module.packed_weight()]) is None
    after = make([module.packed_weight()])
    assert same(after, prepack(module.packed_weight()))
    gc.collect()  # what the first copy was made of is gone, and takes nothing with it
    assert find([module.packed_weight()]) is after


def test_gone_with_the_weight(cache):
    module = layer()
    make([module.packed_weight()])
    assert len(cache) == 1
    del module
    gc.collect()
    assert not cache


def test_memory_that_is_used_again():
    """`module.to` gives a parameter other memory; the next model's weights may lie where the old ones were."""
    module, other = layer(), layer(seed=1)
    memory = {name: tensor.numpy().copy() for name, tensor in module.packed().items()}
    for name in memory:
        module.packed_parameter(name).data = torch.from_numpy(memory[name])
    before = make([module.packed_weight()])
    for name in memory:
        module.packed_parameter(name).data = module.packed_parameter(name).data.clone()
    for name, tensor in other.packed().items():
        memory[name][...] = tensor.numpy()
        other.packed_parameter(name).data = torch.from_numpy(memory[name])
    assert find([other.packed_weight()]) is None
    assert not same(before, make([other.packed_weight()]))
    assert same(make([other.packed_weight()]), prepack(other.packed_weight()))


def test_a_copy_has_its_own(cache):
    module = layer()
    made = make([module.packed_weight()])
    copied = copy.deepcopy(module)
    assert find([copied.packed_weight()]) is None
    assert make([copied.packed_weight()]) is not made
    with torch.no_grad():
        copied.weight.bitwise_not_()
    assert find([module.packed_weight()]) is made
    assert not same(make([copied.packed_weight()]), made)
    del copied
    gc.collect()
    assert len(cache) == 1


def test_inference_tensors():
    with torch.inference_mode():
        module = layer()
        made = make([module.packed_weight()])
        assert find([module.packed_weight()]) is made
