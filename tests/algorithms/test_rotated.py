"""arb-hrc under a Hadamard transform."""

import pytest
import torch

from optimum_arb.algorithms import binarize, hadamard_gain, output_error
from optimum_arb.config import ARBConfig
from optimum_arb.format.hadamard import hadamard_transform, random_signs, rotate
from optimum_arb.format.packing import BinarizedWeight


@pytest.fixture
def outliers(weight, hessian):
    """A weight and inputs, each with a few columns 12 times as large as the others, which are alike: what a transform
    gains on columns of any size depends on which ones the large ones fall on."""
    large = torch.ones(320)
    large[::41] = 12.0
    energy = hessian.diagonal().rsqrt() * large
    return weight / weight.norm(dim=0) * large.roll(3), hessian * energy[:, None] * energy


def test_rotation_changes_no_output(weight, hessian):
    signs = random_signs(320, 0)
    turned, matrix = rotate(weight, hessian, signs, 128)
    inputs = torch.randn(9, 320, generator=torch.Generator().manual_seed(3))
    there = hadamard_transform(inputs * torch.where(signs, 1.0, -1.0), 128)
    torch.testing.assert_close(there @ turned.T, inputs @ weight.T, rtol=1e-4, atol=1e-4)
    expected = (weight @ hessian @ weight.T).diagonal()
    torch.testing.assert_close((turned @ matrix @ turned.T).diagonal(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("act_order", [None, True])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_outliers_cost_less(outliers, block, act_order):
    weight, hessian = outliers
    plain = output_error(weight, binarize(weight, hessian, ARBConfig()).dequantize(), hessian)
    result = binarize(weight, hessian, ARBConfig(hadamard=block, act_order=act_order))
    assert (result.hadamard, result.input_signs.dtype) == (block, torch.bool)
    assert (result.permutation is None) == (act_order is None)
    # 0.75 to 0.91 in six draws, 0.80 on average
    assert output_error(weight, result.dequantize(), hessian) < 0.97 * plain


def test_dequantized_weight_is_what_the_planes_do_to_transformed_inputs(outliers):
    weight, hessian = outliers
    result = binarize(weight, hessian, ARBConfig(hadamard=128, act_order=True))
    inputs = torch.randn(5, 320, generator=torch.Generator().manual_seed(4))
    there = inputs[:, result.permutation] * torch.where(result.input_signs, 1.0, -1.0)
    there = hadamard_transform(there, 128)
    planes = BinarizedWeight(result.layout, 128, result.signs, result.row_scale, result.col_scale)
    torch.testing.assert_close(there @ planes.dequantize().T, inputs @ result.dequantize().T, rtol=1e-4, atol=1e-3)


def test_dead_columns_cost_nothing(outliers):
    weight, hessian = outliers
    hessian[:, 30:40] = hessian[30:40] = 0
    alive = torch.ones(320, dtype=torch.bool)
    alive[30:40] = False
    other = weight.clone()
    other[:, 30:40] = 1e3
    config = ARBConfig(hadamard=128)
    first, second = (binarize(w, hessian, config).dequantize() for w in (weight, other))
    torch.testing.assert_close(
        output_error(other, second, hessian), output_error(weight, first, hessian), rtol=0.05, atol=0
    )


def test_gain_tells_whether_it_pays(outliers):
    config = ARBConfig(hadamard=128)
    assert hadamard_gain(*outliers, config) > 1.1
    generator = torch.Generator().manual_seed(5)
    # signs with scales already: any mixing spoils them
    weight = torch.where(torch.rand(200, 320, generator=generator) < 0.5, 1.0, -1.0) * torch.rand(
        320, generator=generator
    )
    assert hadamard_gain(weight, torch.eye(320), config) == 1  # round-to-nearest is better, so there is no transform
    assert binarize(weight, torch.eye(320), config).hadamard == 0
    assert hadamard_gain(torch.zeros(4, 320), torch.eye(320), config) == 1
    assert config.hadamard == 128


def test_the_same_seed_gives_layers_of_one_input_the_same_signs(outliers):
    weight, hessian = outliers
    first, second = (binarize(w, hessian, ARBConfig(hadamard=128)) for w in (weight, weight[:20] * 2))
    assert torch.equal(first.input_signs, second.input_signs)
    assert not torch.equal(first.input_signs, binarize(weight, hessian, ARBConfig(hadamard=128, seed=1)).input_signs)


def test_without_calibration_there_is_none(weight):
    assert binarize(weight, None, ARBConfig(hadamard=128)).hadamard == 0
    with pytest.raises(ValueError, match="without calibration"):
        ARBConfig(hadamard=128, dataset=None)


def test_a_calibration_matrix_near_the_end_of_float32(weight):
    """Inputs alike but for signs add up to a hundred times as much in one transformed column."""
    sign = torch.where(random_signs(320, ARBConfig().seed), 1.0, -1.0)
    inputs = sign * (1 + 0.1 * torch.randn(400, 320, generator=torch.Generator().manual_seed(0)))
    hessian = inputs.T @ inputs
    config = ARBConfig(hadamard=128)
    large = binarize(weight, hessian * 2.0**118, config).dequantize()
    assert torch.equal(large, binarize(weight, hessian, config).dequantize())
