"""The block Hadamard transform: an orthogonal mixing of neighbouring columns, its own inverse.

With `T(x) = Hadamard(sign * x[permutation])`, signs random, a layer computes `W x = (W T^T) (T x)`: outliers of the
inputs and of the weights spread over their block before the weight is binarized (QuIP#, arXiv 2402.04396; QuaRot, arXiv
2404.00456). `K` need not be a multiple of the block: the columns that are left form the largest powers of two that fit,
576 = 4 * 128 + 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def hadamard_blocks(columns: int, block: int) -> list[int]:
    """The widths of the blocks, all powers of two, in their order: `block` as often as it fits, then the powers of two
    that the rest is made of, the largest first.

    Args:
        columns: K.
        block: a power of two.

    Raises:
        ValueError: a block that is no power of two.
    """
    if not isinstance(block, int) or isinstance(block, bool) or block < 1 or block & (block - 1):
        raise ValueError(f"A Hadamard transform of blocks of {block!r} columns does not exist: use a power of two.")
    whole, rest = divmod(columns, block)
    powers = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [block] * whole + powers


def hadamard_matrix(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> torch.Tensor:
    """The Hadamard matrix of Sylvester's construction, unscaled: entry (i, j) is -1 to the power of the number of bits
    that i and j have in common. Symmetric, +1 and -1, `[size, size]`; its square is `size` times the identity.

    Args:
        size: a power of two.
    """
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard_transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """Multiplies each block of the last dimension by the orthonormal Hadamard matrix of its width.

    The transform is symmetric and its own inverse. Blocks are those of `hadamard_blocks`.

    Args:
        x: floating point `[..., K]`; float16 and bfloat16 are computed in float32.
        block: a power of two.

    Returns:
        `[..., K]` in the dtype of `x`.

    Raises:
        ValueError: a block that is no power of two.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    return multiply_blocks(x, hadamard_matrices(x.shape[-1], block, compute, x.device))


def hadamard_matrices(
    columns: int, block: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> list[tuple[int, torch.Tensor]]:
    """What `multiply_blocks` needs for a transform: how many blocks of a width there are, and the orthonormal matrix of
    that width, in their order.

    Args:
        columns: K.
        block: a power of two.
        dtype: of the matrices.
        device: of the matrices.

    Raises:
        ValueError: a block that is no power of two.
    """
    widths = hadamard_blocks(columns, block)
    return [
        # torch 2.6 does not compile `count` of a list
        (len([one for one in widths if one == width]), hadamard_matrix(width, dtype, device) * width**-0.5)
        for width in dict.fromkeys(widths)
    ]


def multiply_blocks(x: torch.Tensor, matrices: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Blocks of the last dimension of x `[..., K]` times the matrices of `hadamard_matrices`, in the dtype of x."""
    if not matrices:
        return x.clone()
    pieces = []
    for part, (_, matrix) in zip(x.split([n * len(m) for n, m in matrices], -1), matrices, strict=True):
        product = part.to(matrix.dtype).unflatten(-1, (-1, len(matrix))) @ matrix
        pieces.append(product.flatten(-2))
    return torch.cat(pieces, -1).to(x.dtype)


def random_signs(columns: int, seed: int) -> torch.Tensor:
    """Seeded random signs of the columns, bool `[K]` on the CPU, True = +1; the same on every machine.

    Args:
        columns: K.
        seed: any integer from 0 to 2^64 - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (columns,), generator=generator, dtype=torch.uint8, device="cpu").bool()


def rotate(
    weight: torch.Tensor, hessian: torch.Tensor, signs: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`W T^T` and `T H T^T` of the transform `T x = hadamard_transform(sign * x, block)`: what the weight and the
    calibration matrix are for inputs that went through it.

    Args:
        weight: floating point `[N, K]`.
        hessian: `[K, K]`, symmetric.
        signs: bool `[K]`, True = +1.
        block: a power of two.
    """
    sign = torch.where(signs, 1.0, -1.0).to(weight)
    half = hadamard_transform(hessian * sign, block)
    return hadamard_transform(weight * sign, block), hadamard_transform(half.T.contiguous() * sign, block)
