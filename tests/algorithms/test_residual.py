import torch

from optimum_arb.algorithms.residual import nearest_signs, residual_binarization


def test_nearest_signs_equals_a_search_over_all_levels():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(500, generator=generator)
    # scales of either sign and either order of size
    first, second = torch.randn(500, generator=generator), torch.randn(500, generator=generator)
    signs = nearest_signs(target, [first, second])
    value = torch.where(signs[0], first, -first) + torch.where(signs[1], second, -second)
    patterns = [(a, b) for a in (1, -1) for b in (1, -1)]
    best = torch.stack([(target - a * first - b * second).abs() for a, b in patterns]).min(0).values
    torch.testing.assert_close((target - value).abs(), best)


def test_one_group_at_order_one_is_mean_and_mean_deviation():
    weight = torch.tensor([[1.0, 2.0, -4.0, 5.0]])
    fit = residual_binarization(weight, torch.ones(1, 1, 4), order=1)
    assert fit.mean.item() == 1.0
    assert fit.scale.item() == 2.5  # mean of |0|, |1|, |-5|, |4|
    assert fit.signs.flatten().tolist() == [True, True, False, True]
    torch.testing.assert_close(fit.reconstruction(), torch.tensor([[3.5, 3.5, -1.5, 3.5]]))


def test_groups_are_fitted_alone(weight):
    large = (weight.abs() > 0.3).float()
    both = residual_binarization(weight, torch.stack([large, 1 - large]), order=2)
    for index, mask in enumerate((large, 1 - large)):
        for row in (0, 17):
            members = weight[row][mask[row] > 0]
            alone = residual_binarization(members[None], torch.ones(1, 1, len(members)), order=2)
            torch.testing.assert_close(both.mean[row, index], alone.mean[0, 0])
            torch.testing.assert_close(both.scale[row, index], alone.scale[0, 0])


def test_second_order_is_never_worse(weight):
    groups = torch.ones(1, *weight.shape)
    first, second = (
        (weight - residual_binarization(weight, groups, order).reconstruction()).square().sum() for order in (1, 2)
    )
    assert second < 0.6 * first


def test_empty_group_gives_zero_and_no_nan(weight):
    groups = torch.stack([torch.zeros_like(weight), torch.ones_like(weight)])
    fit = residual_binarization(weight, groups, order=2)
    assert fit.scale[:, 0].eq(0).all()
    assert torch.isfinite(fit.reconstruction()).all()
