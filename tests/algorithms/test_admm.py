import pytest
import torch

from optimum_arb.algorithms import admm, output_error
from optimum_arb.algorithms.admm import admm_planes, product_dtype
from optimum_arb.algorithms.compensation import binarize_blocks
from optimum_arb.algorithms.hessian import prepare_hessian
from optimum_arb.algorithms.planes import fit_planes
from optimum_arb.algorithms.refinement import refine_blocks


def total(fits):
    return torch.cat([fit.reconstruction() for fit in fits], 1)


@pytest.fixture
def prepared(hessian):
    return prepare_hessian(hessian, 0.01, act_order=False)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("block_size", [128, 320])
def test_beats_the_block_loop(weight, prepared, planes, block_size):
    def fit_block(block, start, stop):
        fit = fit_planes(block, prepared.factor[start:stop, start:stop], planes, 2)
        return fit.reconstruction(), fit

    loop = binarize_blocks(weight.clone(), prepared, block_size, "exact", fit_block)
    search = admm_planes(weight, prepared.damped, block_size, planes, 20)
    errors = []
    for fits in (loop, search):
        refine_blocks(weight, prepared, block_size, fits, 2)
        errors.append(output_error(weight, total(fits), prepared.damped))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("col_scale", [True, False])
@pytest.mark.parametrize("planes", [1, 2])
def test_a_weight_of_the_form_is_found_again(planes, col_scale):
    generator = torch.Generator().manual_seed(0)
    bits = torch.where(torch.rand(planes, 40, 192, generator=generator) < 0.5, 1.0, -1.0)
    row = (torch.rand(planes, 40, generator=generator) + 0.5) * torch.tensor([1.0, 0.3])[:planes, None]
    col = torch.rand(planes, 192, generator=generator) + 0.5 if col_scale else torch.ones(planes, 192)
    weight = torch.einsum("pnk,pn,pk->nk", bits, row, col)
    fits = admm_planes(weight, torch.eye(192), 192, planes, 40, col_scale)
    assert output_error(weight, total(fits), None) < 1e-3


@pytest.mark.parametrize("iterations", [1, 3, 7, 25])
def test_any_number_of_iterations(weight, prepared, iterations):
    fits = admm_planes(weight, prepared.damped, 128, 1, iterations)
    assert [fit.signs.shape for fit in fits] == [(1, 48, 128), (1, 48, 128), (1, 48, 64)]
    assert [fit.row.shape for fit in fits] == [(1, 48)] * 3
    assert all(set(fit.signs.unique().tolist()) == {-1.0, 1.0} for fit in fits)
    assert output_error(weight, total(fits), prepared.damped) < 1
    with pytest.raises(ValueError, match="iterations=0"):
        admm_planes(weight, prepared.damped, 128, 1, 0)


def test_without_column_scales_they_stay_one(weight, prepared):
    fits = admm_planes(weight, prepared.damped, 128, 2, 5, col_scale=False)
    assert all(torch.equal(fit.col, torch.ones_like(fit.col)) for fit in fits)
    refine_blocks(weight, prepared, 128, fits, 1, col_scale=False)
    assert output_error(weight, total(fits), prepared.damped) < 0.2


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_degenerate_weights_stay_finite(planes):
    matrix = torch.eye(16) + 0.1
    for weight in (torch.zeros(4, 16), torch.ones(4, 16), torch.eye(16)[:4]):
        assert torch.isfinite(total(admm_planes(weight, matrix, 8, planes, 6))).all()
    assert not total(admm_planes(torch.zeros(4, 16), matrix, 8, planes, 6)).any()


@pytest.mark.parametrize("planes", [1, 2])
def test_products_in_16_bits_are_as_good(weight, prepared, planes, monkeypatch):
    """What a CPU with AMX does, and what one without does."""
    errors = []
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        assert (product_dtype(weight.device) == torch.bfloat16) == (amx and torch.backends.mkldnn.is_available())
        fits = admm_planes(weight, prepared.damped, 128, planes, 25)
        refine_blocks(weight, prepared, 128, fits, 2)
        errors.append(output_error(weight, total(fits), prepared.damped))
    assert errors[1] < 1.03 * errors[0]


@pytest.mark.parametrize("size", [1, 63, 64, 200, 517])
def test_the_inverse_of_a_triangular_matrix(monkeypatch, size):
    monkeypatch.setattr(admm, "LARGEST_SOLVE", 64)
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator).tril(-1) / size + torch.eye(size)
    inverse = admm._triangular_inverse(lower)
    torch.testing.assert_close(inverse @ lower, torch.eye(size), atol=1e-5, rtol=0)
    assert torch.equal(inverse, inverse.tril())
