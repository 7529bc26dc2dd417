import pytest
import torch

from optimum_arb.format.hadamard import hadamard_blocks, hadamard_matrix, hadamard_transform, random_signs


@pytest.mark.parametrize(
    ("columns", "block", "widths"),
    [
        (576, 128, [128] * 4 + [64]),
        (576, 256, [256, 256, 64]),
        (1536, 256, [256] * 6),
        (100, 128, [64, 32, 4]),
        (129, 128, [128, 1]),
        (1, 128, [1]),
        (0, 128, []),
        (5, 1, [1] * 5),
    ],
)
def test_blocks(columns, block, widths):
    assert hadamard_blocks(columns, block) == widths
    assert sum(widths) == columns


@pytest.mark.parametrize("block", [0, 3, 96, -128, 128.0, True])
def test_blocks_are_powers_of_two(block):
    with pytest.raises(ValueError, match="power of two"):
        hadamard_blocks(576, block)


def test_matrix_is_sylvesters():
    matrix = hadamard_matrix(8)
    expected = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)])
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("columns", [1, 7, 64, 128, 320, 576])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_transform_is_an_orthogonal_involution(columns, block):
    x = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = hadamard_transform(x, block)
    torch.testing.assert_close(hadamard_transform(there, block), x)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    matrix = hadamard_transform(torch.eye(columns, dtype=torch.float64), block)
    torch.testing.assert_close(matrix, matrix.T)
    expected = torch.block_diag(*[hadamard_matrix(w, torch.float64) / w**0.5 for w in hadamard_blocks(columns, block)])
    torch.testing.assert_close(matrix, expected)


def test_transform_spreads_an_outlier_over_its_block():
    x = torch.zeros(256)
    x[5] = 1.0
    there = hadamard_transform(x, 128)
    torch.testing.assert_close(there[:128].abs(), torch.full((128,), 128**-0.5))
    assert not there[128:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.full((2, 256), 3000.0).to(dtype)  # a float16 sum of 256 of them overflows
    x[:, ::2] *= -1
    there = hadamard_transform(x, 256)
    assert there.dtype == dtype
    assert torch.isfinite(there).all()
    torch.testing.assert_close(there, hadamard_transform(x.float(), 256).to(dtype))


def test_random_signs_are_seeded_and_balanced():
    signs = random_signs(4096, 3)
    assert signs.dtype == torch.bool
    assert torch.equal(signs, random_signs(4096, 3))
    assert not torch.equal(signs, random_signs(4096, 4))
    assert 1900 < int(signs.sum()) < 2200


def test_signs_do_not_depend_on_the_default_device():
    expected = random_signs(300, 1)
    with torch.device("meta"):
        assert torch.equal(random_signs(300, 1).cpu(), expected)
