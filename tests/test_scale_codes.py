import pytest
import torch

from optimum_arb.scale_codes import NARROWEST, WIDEST, decode_scales, encode_scales, scale_grid


@pytest.mark.parametrize("dim", [1, (1, 2), (0, 1)])
def test_values_are_kept_to_half_a_step(dim):
    scale = torch.rand(3, 50, 20, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.05
    low, step = scale_grid(scale, dim)
    value = decode_scales(encode_scales(scale, low, step), low, step)
    assert ((value / scale).log2().abs() <= step / 2 + 1e-5).all()
    # the largest and the smallest are on the grid
    torch.testing.assert_close(value.amax(dim), scale.amax(dim))
    torch.testing.assert_close(value.amin(dim), scale.amin(dim))


def test_a_code_is_the_code_of_its_value():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for spread in (NARROWEST, 0.01, WIDEST / 254):
        for low in (-40.0, -7.3, 0.0, 15.0):
            grid = torch.tensor([[low]]), torch.tensor([[spread]])
            assert torch.equal(encode_scales(decode_scales(codes, *grid), *grid), codes)


def test_planes_have_grids_of_their_own():
    scale = torch.rand(2, 100, generator=torch.Generator().manual_seed(1)) + 0.5
    scale[1] *= 1e-6
    low, step = scale_grid(scale, 1)
    value = decode_scales(encode_scales(scale, low, step), low, step)
    assert low.shape == step.shape == (2, 1)
    assert ((value - scale).abs() / scale).max() < 0.01


def test_zero_is_kept_and_far_smaller_values_do_not_widen_the_grid():
    scale = torch.tensor([[1.0, 0.5, 0.25, 0.0, 2.0**-30, 2.0**-12.1]])
    low, step = scale_grid(scale, 1)
    value = decode_scales(encode_scales(scale, low, step), low, step)
    assert value[0, 3] == 0
    assert value[0, 4] == 0
    assert value[0, 5] == pytest.approx(2.0**-12, rel=1e-3)
    assert ((value - scale).abs() / scale)[0, :3].max() < 0.02


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20])
def test_equal_scales_are_kept(value):
    scale = torch.full((1, 10), value)
    grid = scale_grid(scale, 1)
    torch.testing.assert_close(decode_scales(encode_scales(scale, *grid), *grid), scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scales_that_have_no_code_are_refused(value):
    with pytest.raises(ValueError, match="8-bit scales"):
        scale_grid(torch.tensor([[1.0, value]]), 1)
