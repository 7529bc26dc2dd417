import pytest
import torch


@pytest.fixture
def weight():
    """`[48, 320]`: columns of very different size, as real layers have, and a block of 64 at the end."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(320, generator=generator) ** 2 + 0.05
    return torch.randn(48, 320, generator=generator) * columns


@pytest.fixture
def hessian():
    """`X^T X` of 1000 correlated inputs whose energies differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(320, 320, generator=generator) * 0.2 + torch.eye(320)
    inputs = torch.randn(1000, 320, generator=generator) @ mix
    inputs *= torch.rand(320, generator=generator) ** 2 * 3 + 0.02
    return inputs.T @ inputs
