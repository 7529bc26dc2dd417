"""The steps of `SignTerms` against the formulas that they stand for, in float64 and without chunks."""

import pytest
import torch

from optimum_arb.algorithms import sign_terms
from optimum_arb.algorithms.sign_terms import SignTerms

SHAPES = [(7, 20, 8), (30, 200, 128), (5, 12, 64), (33, 256, 128), (3, 9, 3)]


@pytest.fixture(autouse=True, params=[64, sign_terms.CHUNK])
def chunk(request, monkeypatch):
    """Chunks of a row or a few, and one of all rows."""
    monkeypatch.setattr(sign_terms, "CHUNK", request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(terms: SignTerms, columns: int) -> torch.Tensor:
    """float64 `[P, N, K]`."""
    return torch.einsum("pnb,pbk->pnbk", terms.row.double(), terms.col.double()).flatten(2)[..., :columns]


def patterns(planes: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * planes).view(-1, planes)


def nearest(size: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The nearest levels."""
    levels = torch.einsum("qp,pnk->qnk", patterns(len(size)), size)
    return levels.gather(0, (levels - wanted).abs().argmin(0)[None])[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_starts_with_greedy_planes(shape, planes):
    rows, columns, block_size = shape
    weight = random(rows, columns)
    terms = SignTerms(weight, block_size, planes, True)
    residual = weight.double()
    for _ in range(planes):
        parts = []
        for block in residual.split(block_size, 1):
            size, col = block.abs(), torch.ones_like(block[0])
            for _ in range(3):
                row = size @ col / col.square().sum()
                col = row @ size / row.square().sum()
            parts.append(torch.where(block >= 0, 1.0, -1.0) * row[:, None] * col)
        residual = residual - torch.cat(parts, 1)
    torch.testing.assert_close(terms.reconstruction().double(), weight - residual, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.wanted, terms.reconstruction())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("col_scale", [True, False])
def test_an_iteration(shape, planes, col_scale):
    """X and U as the formulas have them; then the nearest signs, then row and column scales of each plane in turn."""
    rows, columns, block_size = shape
    weight, pull = random(rows, columns).double(), random(columns, columns, seed=1).double() / columns
    terms = SignTerms(weight.float(), block_size, planes, col_scale)
    dual = torch.zeros_like(weight)
    for _ in range(3):
        near = terms.reconstruction().double()
        row, col = terms.row.double(), terms.col.double()
        size = sizes(terms, columns)

        terms.leave()
        terms.add_product(pull.float())
        wanted = dual + weight - (weight - near + dual) @ pull
        torch.testing.assert_close(terms.wanted.double(), wanted, rtol=1e-4, atol=1e-4)
        wanted = terms.wanted.double()  # so that no sign at its threshold differs

        terms.project()
        signs = reached(nearest(size, wanted), size)
        for plane in range(planes):
            others = sum(signs[p] * scaled(row[p], col[p], columns) for p in range(planes) if p != plane)
            wish = (wanted - others) * signs[plane]
            for block, part in enumerate(wish.split(block_size, 1)):
                scale = col[plane, block, : part.shape[1]]
                row[plane, :, block] = part @ scale / scale.square().sum()
                if col_scale:
                    energy = row[plane, :, block].square().sum()
                    col[plane, block, : part.shape[1]] = row[plane, :, block] @ part / energy
        torch.testing.assert_close(terms.row.double(), row, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(terms.col.double(), col, rtol=1e-3, atol=1e-4)
        dual = wanted - terms.reconstruction().double()


def scaled(row: torch.Tensor, col: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.einsum("nb,bk->nbk", row, col).flatten(1)[:, :columns]


def reached(level: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The signs `[P, N, K]` by which `size` comes to `level`."""
    levels = torch.einsum("qp,pnk->qnk", patterns(len(size)), size)
    return patterns(len(size))[(levels - level).abs().argmin(0)].permute(2, 0, 1)


@pytest.mark.parametrize("planes", [2, 3])
def test_nearest_signs_for_scales_of_any_sign(planes):
    terms = SignTerms(random(7, 20), 8, planes, True)
    terms.row.mul_(random(*terms.row.shape, seed=1))
    wanted = random(7, 20, seed=2)
    size = sizes(terms, 20)
    terms.wanted.copy_(wanted)
    for chunk in terms._chunks:
        chunk.choose_signs()
    torch.testing.assert_close(terms.reconstruction().double(), nearest(size, wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_projection_never_moves_away(planes):
    """Signs, then scales: each step lowers the distance to what is wanted."""
    wanted = random(30, 200, seed=1)
    terms = SignTerms(random(30, 200), 128, planes, True)
    terms.wanted.copy_(wanted)
    last = (wanted - terms.reconstruction()).norm()
    for _ in range(4):
        terms.project()
        now = (wanted - terms.reconstruction()).norm()
        assert now <= last * (1 + 1e-6)
        last = now


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("col_scale", [True, False])
def test_fits_are_the_terms_on_columns_of_their_size(planes, col_scale):
    size = torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.5 if col_scale else torch.full((200,), 0.7)
    terms = SignTerms(random(30, 200), 128, planes, col_scale)
    fits = terms.fits(size)
    assert [fit.signs.shape for fit in fits] == [(planes, 30, 128), (planes, 30, 72)]
    assert all(set(fit.signs.unique().tolist()) == {-1.0, 1.0} for fit in fits)
    total = torch.cat([fit.reconstruction() for fit in fits], 1)
    torch.testing.assert_close(total, terms.reconstruction() / size)
