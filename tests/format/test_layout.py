import pytest
import torch
from packed_weights import random_binarized

from optimum_arb.format.layout import all_layouts, bitmap_layout, layout_from_name, planes_layout


@pytest.mark.parametrize("layout", all_layouts(), ids=lambda layout: layout.name)
def test_every_stored_value_is_used_and_every_index_is_stored(layout):
    planes = {plane for term in layout.terms for plane in term.planes}
    cols = {term.col for term in layout.terms if term.col is not None}
    assert planes == set(range(layout.planes + layout.salient_planes))
    assert {term.row for term in layout.terms} == set(range(layout.row_scales))
    assert cols == set(range(layout.col_scales + layout.salient_col_scales))
    for term in layout.terms:
        compact = any(p >= layout.planes for p in term.planes) or (term.col or 0) >= max(layout.col_scales, 1)
        assert term.zone == "salient" or not compact  # only the salient columns have those
    assert layout.salient == any(term.zone == "salient" for term in layout.terms)
    assert layout_from_name(layout.name) is layout


@pytest.mark.parametrize(
    ("form", "row_scales", "col_scales"),
    [
        # parameters per row and block, and per column, as the papers' methods need them
        (("non-salient", True, False), 7, 0),
        (("all", True, False), 10, 0),
        (("non-salient", True, True), 4, 2),
        (("all", True, True), 6, 2),
    ],
)
def test_parameters_of_the_papers_methods(form, row_scales, col_scales):
    layout = bitmap_layout(*form)
    assert (layout.row_scales, layout.col_scales) == (row_scales, col_scales)


def test_two_groups_without_column_scales():
    """A row scale and a mean per group, from half sums and half differences and the product of the two planes."""
    weight = random_binarized(bitmap_layout("non-salient", False, False), 5, 64)
    sign = torch.where(weight.signs[0], 1.0, -1.0)
    large = weight.signs[0] == weight.signs[1]
    a_sum, a_half, m_sum, m_half = (weight.row_scale[:, 0, i, None] for i in range(4))
    scale = torch.where(large, a_sum + a_half, a_sum - a_half)
    mean = torch.where(large, m_sum + m_half, m_sum - m_half)
    torch.testing.assert_close(weight.dequantize(), sign * scale + mean)


def test_two_groups_with_column_scales():
    weight = random_binarized(bitmap_layout("non-salient", False, True), 5, 64)
    sign = torch.where(weight.signs[0], 1.0, -1.0)
    large = weight.signs[0] == weight.signs[1]
    first, second = (weight.row_scale[:, 0, g, None] * weight.col_scale[g] for g in (0, 1))
    torch.testing.assert_close(weight.dequantize(), sign * torch.where(large, first, second))


def test_unknown_forms():
    with pytest.raises(ValueError, match="1 to 3"):
        planes_layout(4)
    with pytest.raises(ValueError, match="group_bitmap='some'"):
        bitmap_layout("some", True, True)
    with pytest.raises(ValueError, match="Unknown layout 'planes-9'"):
        layout_from_name("planes-9")
