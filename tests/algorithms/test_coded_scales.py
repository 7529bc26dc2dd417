import pytest
import torch

from optimum_arb.algorithms import binarize, output_error
from optimum_arb.algorithms.admm import admm_planes
from optimum_arb.algorithms.coded_scales import GridRounding, code_scales
from optimum_arb.algorithms.hessian import prepare_hessian
from optimum_arb.algorithms.planes import PlanesFit, normalize
from optimum_arb.algorithms.refinement import refine_blocks
from optimum_arb.config import ARBConfig
from optimum_arb.format.factors import pack_factors, unpack_factors
from optimum_arb.format.packing import pack, unpack
from optimum_arb.format.scales import round_scales


def fitted(weight, hessian, planes, col_scale=True):
    prepared = prepare_hessian(hessian, 0.01, act_order=False)
    fits = admm_planes(weight, prepared.damped, 128, planes, 8, col_scale)
    refine_blocks(weight, prepared, 128, fits, 1, col_scale)
    return prepared, fits


def error(weight, prepared, fits):
    return output_error(weight, torch.cat([fit.reconstruction() for fit in fits], 1), prepared.damped)


@pytest.mark.parametrize("col_scale", [True, False])
@pytest.mark.parametrize("planes", [1, 2])
def test_scales_are_on_grids_and_the_fit_is_better_than_rounding_alone(weight, hessian, planes, col_scale):
    prepared, fits = fitted(weight, hessian, planes, col_scale)
    for fit in fits:
        normalize(fit)
    rounding = GridRounding.of(fits, col_scale)
    rounded = [PlanesFit(fit.signs.clone(), rounding.row(fit.row), rounding.col(fit.col)) for fit in fits]
    assert error(weight, prepared, rounded) < 1.01 * error(weight, prepared, fits)
    code_scales(weight, prepared, 128, fits, col_scale)
    assert error(weight, prepared, fits) < error(weight, prepared, rounded)
    for fit in fits:
        assert torch.equal(rounding.row(fit.row), fit.row)
        assert torch.equal(rounding.col(fit.col), fit.col)


def test_rounding_is_that_of_the_file_format(weight, hessian):
    _, fits = fitted(weight, hessian, 2)
    for fit in fits:
        normalize(fit)
    rounding = GridRounding.of(fits, True)
    for plane in range(2):
        row, col = torch.cat([fit.row[plane] for fit in fits]), torch.cat([fit.col[plane] for fit in fits])
        assert torch.equal(torch.cat([rounding.row(fit.row)[plane] for fit in fits]), round_scales(row))
        assert torch.equal(torch.cat([rounding.col(fit.col)[plane] for fit in fits]), round_scales(col))
    some = torch.tensor([[0.0, -0.01], [0.02, 0.0]])
    assert torch.equal(rounding.row(-some), -rounding.row(some))


@pytest.mark.parametrize("block_size", [128, -1])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_eight_bits_lose_nothing(weight, hessian, planes, block_size):
    errors, stored = [], []
    for bits in (16, 8):
        config = ARBConfig(planes=planes, block_size=block_size, scale_bits=bits)
        packed = pack(binarize(weight, hessian, config), bits)
        restored = unpack(packed, config.layout, weight.shape[1], block_size).dequantize()
        errors.append(output_error(weight, restored, hessian))
        stored.append(sum(tensor.nbytes for tensor in packed.values()))
    assert errors[1] < 1.01 * errors[0]
    assert stored[1] < stored[0]


# factors of a column of the weight, and of its inputs
MASSIVE = [(1e-2, 1e3), (1e-2, 1e4), (1e-3, 1e4)]


def with_massive_inputs(size: float, activation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[64, 256]` and its calibration matrix."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 256, generator=generator), torch.randn(1000, 256, generator=generator)
    weight[:, 7] *= size
    inputs[:, 7] *= activation
    return weight, inputs.T @ inputs


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("size", "activation"), MASSIVE)
def test_small_weights_of_massive_inputs_are_not_rounded_to_nothing(planes, size, activation):
    """They carry as much of the outputs as all others, and their column scale is far below those."""
    weight, hessian = with_massive_inputs(size, activation)
    errors = []
    for bits in (16, 8):
        config = ARBConfig(planes=planes, scale_bits=bits)
        stored = unpack(pack(binarize(weight, hessian, config), bits), config.layout, 256, 128)
        errors.append(output_error(weight, stored.dequantize(), hessian))
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("unit", [1.0, 0.01])
@pytest.mark.parametrize(("size", "activation"), MASSIVE)
def test_nor_are_they_in_a_product_of_sign_matrices(unit, size, activation):
    weight, hessian = with_massive_inputs(size, activation)
    errors = []
    for bits in (16, 8):
        config = ARBConfig(method="arb-dbf", rank=48, num_iterations=20, scale_bits=bits)
        stored = unpack_factors(pack_factors(binarize(unit * weight, hessian, config), bits), 256)
        errors.append(output_error(unit * weight, stored.dequantize(), hessian))
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize("size", [1.0, 0.03])
@pytest.mark.parametrize("planes", [1, 3])
def test_what_is_stored_is_what_was_fitted(weight, hessian, planes, size, hadamard):
    """Scales stay on the grids that they were fitted on, whose ends need not be in use."""
    fitted = binarize(weight * size, hessian, ARBConfig(planes=planes, scale_bits=8, hadamard=hadamard))
    stored = unpack(pack(fitted, 8), fitted.layout, weight.shape[1], 128, fitted.hadamard)
    for name in ("row_scale", "col_scale"):
        here, there = getattr(fitted, name).abs(), getattr(stored, name).float()
        # the start of a grid is float32, and moves by the size of the weight: a step of float16 now and then
        torch.testing.assert_close(there, here, rtol=2**-10, atol=0)
        assert (here == there).float().mean() > 0.99


def test_zero_rows_stay_zero(weight, hessian):
    weight[5] = 0
    config = ARBConfig(scale_bits=8)
    packed = pack(binarize(weight, hessian, config), 8)
    assert not unpack(packed, config.layout, weight.shape[1], 128).dequantize()[5].any()


def test_scales_that_no_grid_holds_stay():
    weight = torch.full((3, 128), 1e-30)
    prepared = prepare_hessian(torch.eye(128), 0.01, act_order=False)
    fits = [PlanesFit(torch.ones(1, 3, 128), torch.full((1, 3), 1e-30), torch.ones(1, 128))]
    code_scales(weight, prepared, 128, fits)
    torch.testing.assert_close(fits[0].reconstruction(), weight)
