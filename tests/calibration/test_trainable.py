"""The trainable twins: the same function as the packed layer, the right gradients, the right confidence."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optimum_arb import ARBConfig
from optimum_arb.algorithms import binarize
from optimum_arb.calibration.trainable import LEAST_CONFIDENCE, MOST_CONFIDENCE, TrainablePlanes, trainable
from optimum_arb.nn.factorized import packed_linear

ROWS, COLUMNS = 24, 192
FORMS: dict[str, dict[str, Any]] = {
    "one plane": {"planes": 1},
    "two planes": {"planes": 2, "block_size": 64},
    "factors": {"method": "arb-dbf", "factor_bits": 2.0, "num_iterations": 3},
    "ARB-RC": {"method": "arb-rc"},
    "ARB-X without bitmaps": {"method": "arb-x", "group_bitmap": "none"},
    "BiLLM": {"method": "billm"},
    "round-to-nearest": {"method": "rtn", "block_size": -1},
}


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    inputs = torch.randn(400, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 8
    return weight, inputs.T @ inputs


def packed(problem, form):
    return packed_linear(binarize(*problem, ARBConfig(**FORMS[form])), bias=torch.linspace(-1, 1, ROWS))


@pytest.mark.parametrize("train_signs", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_twin_computes_what_the_layer_does_and_gives_it_back(problem, form, train_signs):
    layer = packed(problem, form)
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    x = torch.randn(3, 2, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    twin = trainable(layer, train_signs)
    torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
    twin.round_scales()
    twin.write_back()
    after = layer.packed()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("form", FORMS)
def test_trained_scales_and_signs_arrive_in_the_layer(problem, form):
    layer = packed(problem, form)
    twin = trainable(layer, True)
    twin.set_confidence(*problem)
    with torch.no_grad():
        for scale in twin.scales():
            scale.mul_(1.25)
        for latent in twin.latents:
            latent[0].neg_()
    twin.round_scales()
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2))
    expected = twin(x).detach()
    twin.write_back()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize("form", FORMS)
def test_confidence_is_the_cost_of_turning_a_sign(problem, form):
    """Against the definition: turn one sign, compare the squared errors of the outputs."""
    weight, hessian = problem
    layer = packed(problem, form)
    layer.bias = None
    twin = trainable(layer, True)
    twin.set_confidence(weight, hessian)
    for latent, signs in zip(twin.latents, twin.signs, strict=True):
        assert (latent >= 0).equal(signs)
        inside = (latent.detach().abs() > LEAST_CONFIDENCE) & (latent.detach().abs() < MOST_CONFIDENCE)
        places = inside.nonzero()[:: max(1, int(inside.sum()) // 4)]
        assert len(places) >= 3
        for place in map(tuple, places.tolist()):
            own = dense(twin)
            with torch.no_grad():
                latent[place] = -latent[place]
            other = dense(twin)
            with torch.no_grad():
                latent[place] = -latent[place]
            cost = error(weight - other, hessian) - error(weight - own, hessian)
            assert cost / error(own - other, hessian) == pytest.approx(
                float(latent[place].detach().abs()), rel=2e-3, abs=2e-3
            )


def test_a_transform_of_the_inputs_is_followed(problem):
    weight, hessian = problem
    binarized = binarize(weight, hessian, ARBConfig(hadamard=128))
    twin = TrainablePlanes(SimpleNamespace(binarized=lambda: binarized, packed=dict, bias=None), True)  # type: ignore[arg-type]
    torch.testing.assert_close(dense(twin), binarized.dequantize(torch.float64), rtol=1e-4, atol=1e-4)
    twin.set_confidence(weight, hessian)
    own, latent = dense(twin), twin.latents[0]
    with torch.no_grad():
        latent[2, 7] = -latent[2, 7]
    other = dense(twin)
    cost = error(weight - other, hessian) - error(weight - own, hessian)
    assert cost / error(own - other, hessian) == pytest.approx(float(latent[2, 7].detach().abs()), rel=2e-3)


@pytest.mark.parametrize("form", ["one plane", "factors"])
def test_the_gradient_of_a_latent_is_that_of_its_sign(problem, form):
    twin = trainable(packed(problem, form), True)
    target = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(4))
    (twin(x) - target).square().sum().backward()
    for index, latent in enumerate(twin.latents):
        place = (3, 5)
        values = []
        for step in (1.0, -1.0):  # of the sign itself, as a number: the loss is a parabola in it
            twin._current = lambda at, step=step, index=index, place=place: nudged(twin, at, index, place, step)
            values.append(float((twin(x) - target).detach().double().square().sum()))
            del twin._current
        assert float(latent.grad[place]) == pytest.approx((values[0] - values[1]) / 2, rel=1e-2)
    assert all(scale.grad.abs().sum() > 0 for scale in twin.scales())


def nudged(twin, at, index, place, step):
    signs = torch.where(twin.latents[at] >= 0, 1.0, -1.0)
    if at == index:
        signs[place] += step
    return signs


def test_what_is_dead_gets_a_finite_confidence():
    """Columns without input and rows without weight: neither zero over zero nor infinity."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 128, generator=generator)
    weight[3] = 0
    inputs = torch.randn(200, 128, generator=generator)
    inputs[:, 40:50] = 0
    hessian = inputs.T @ inputs
    for config in (ARBConfig(), ARBConfig(method="arb-dbf", num_iterations=3)):
        twin = trainable(packed_linear(binarize(weight, hessian, config)), True)
        twin.set_confidence(weight, hessian)
        for latent, signs in zip(twin.latents, twin.signs, strict=True):
            assert torch.isfinite(latent).all()
            assert (latent >= 0).equal(signs)


def dense(twin):
    return twin(torch.eye(COLUMNS)).T.detach().double()


def error(difference, hessian):
    difference = difference.double()
    return float(((difference @ hessian.double()) * difference).sum())


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("form", ["one plane", "two planes", "factors"])
def test_scales_in_8_bits_are_trained_on_their_grid(problem, form, size):
    """What is packed at the end is what was trained, not a rounding of it, also where factors are balanced anew."""
    layer = packed_linear(binarize(*problem, ARBConfig(scale_bits=8, **FORMS[form])), scale_bits=8)
    twin = trainable(layer, False)
    before = dense(twin)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for scale in twin.scales():
            scale.mul_(1 + 0.1 * torch.randn(scale.shape, generator=generator))
        if form == "factors" and size != 1:
            twin.row_scale.mul_(1 / size).clamp_max_(float(twin.row_scale.max()))
            twin.scale_grid[0, 0] -= math.log2(size)
            twin._set_grid(twin.scale_grid)
    gradients = torch.autograd.grad(twin(torch.eye(COLUMNS)).square().sum(), twin.scales())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    trained = dense(twin)
    assert not torch.allclose(trained, before, rtol=0.01)
    twin.round_scales()
    torch.testing.assert_close(dense(twin), trained, rtol=1e-5, atol=1e-5)
    twin.write_back()
    torch.testing.assert_close(layer.dequantize(torch.float64), trained, rtol=1e-5, atol=1e-5)
