import itertools

import pytest
import torch

from optimum_arb.budget.allocation import Choice, allocate, interpolate, lower_hull


def random_choices(modules, options, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(modules, options, 2, generator=generator, dtype=torch.float64)
    return {
        f"layer.{m}": [
            Choice(int(10 + 90 * values[m, o, 0]), float(values[m, o, 1]), {"planes": o + 1}) for o in range(options)
        ]
        for m in range(modules)
    }


def total(found):
    return sum(choice.bits for choice in found.values()), sum(choice.error for choice in found.values())


@pytest.mark.parametrize("seed", range(20))
def test_within_the_budget_and_within_a_step_of_the_optimum(seed):
    choices = random_choices(5, 4, seed)
    least = sum(min(o.bits for o in options) for options in choices.values())
    for budget in (least, least + 40, least + 120, 10_000):
        found = allocate(choices, budget)
        bits, error = total(found)
        assert bits <= budget
        assert list(found) == list(choices)
        every = (dict(zip(choices, some, strict=True)) for some in itertools.product(*choices.values()))
        best = min(total(some)[1] for some in every if total(some)[0] <= budget)
        step = max(
            first.error - second.error
            for options in choices.values()
            for hull in [lower_hull(options)]
            for first, second in itertools.pairwise([*hull, hull[-1]])
        )
        assert best <= error <= best + step + 1e-12


def test_more_budget_is_never_worse_and_all_of_it_takes_the_best():
    choices = random_choices(8, 5, 1)
    least = sum(min(o.bits for o in options) for options in choices.values())
    errors = [total(allocate(choices, least + extra))[1] for extra in (0, 100, 200, 400, 10_000)]
    assert errors[-1] == pytest.approx(sum(min(o.error for o in options) for options in choices.values()))
    assert errors == sorted(errors, reverse=True)


def test_a_budget_below_the_smallest_choices_is_refused():
    choices = {"a": [Choice(10, 0.5, {})], "b": [Choice(20, 0.5, {})]}
    assert total(allocate(choices, 30))[0] == 30
    with pytest.raises(ValueError, match="below the 30"):
        allocate(choices, 29)


def test_an_error_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="layer: a choice of 10 bits"):
        allocate({"layer": [Choice(10, float("nan"), {})]}, 100)


def test_interpolation_is_exact_where_the_logarithm_is_linear():
    assert interpolate([(10, 0.1), (20, 0.01), (30, 0.001)], [10, 15, 20, 30, 40, 5]) == pytest.approx(
        [0.1, 0.1**1.5, 0.01, 0.001, 0.0001, 0.1**0.5]
    )


def test_one_size_has_its_error_at_all_bits():
    assert interpolate([(896, 0.25)], [896, 1792]) == pytest.approx([0.25, 0.25])
