"""The nearest sign planes to a weight, all blocks at once: what an iteration of ADMM does beside its matrix product.

It does no more than pass over memory. On a CPU it goes over chunks of rows that stay in a core's cache, and writes into
tensors that are kept: a new one of some megabytes costs as much as three passes over it. On other devices all rows are
one chunk. The last block is filled up to the width of the others with columns of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import TypeVar

import torch

from ..spare_threads import add_product, in_parts, spare_now
from .planes import PlanesFit
from .products import product_float32

# Weights in a chunk: five float32 tensors of this size are in the 2 MB cache of a core.
CHUNK = 96 * 1024

Result = TypeVar("Result")


class SignTerms:
    """`Z = sum_p row_p col_p^T * signs_p` in every block, the nearest that was found to `wanted`, which is X + U.

    Attributes:
        row: float32 `[P, N, blocks]`.
        col: float32 `[P, blocks, width]`; 0 where the last block is filled up.
        wanted: float32 `[N, K]`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        block_size: int,
        planes: int,
        col_scale: bool,
        product_dtype: torch.dtype = torch.float32,
    ):
        """Starts with a greedy Z, plane after plane the signs of what the former ones left; this Z is also `wanted`.

        Args:
            weight: W, float32 `[N, K]`.
            block_size: columns of a block; the last one holds what is left.
            planes: P.
            col_scale: whether there are column scales; without, they are 1.
            product_dtype: of the factors of `add_product` and of what comes of them, which is then summed in float32.
        """
        rows, columns = weight.shape
        width = min(block_size, columns)
        blocks = -(-columns // width)
        self._col_scale = col_scale
        target = weight.new_zeros(rows, blocks * width)
        target[:, :columns] = weight
        wanted = target.clone()
        gap = torch.empty_like(target, dtype=product_dtype)
        # one plane has the signs of what is wanted, and leaves nothing to others
        residual = target.clone() if planes > 1 else wanted
        signs = target.new_empty(planes, *target.shape) if planes > 1 else wanted[None]
        self.wanted, self._gap, self._signs = wanted[:, :columns], gap[:, :columns], signs[..., :columns]
        self.row = weight.new_zeros(planes, rows, blocks)
        self.col = torch.ones_like(target[0]).repeat(planes, 1)
        self.col[:, columns:] = 0
        self.col = self.col.view(planes, blocks, width)
        height = min(rows, max(1, CHUNK // (blocks * width))) if weight.device.type == "cpu" else rows
        scratch = weight.new_empty(4 + planes if planes > 1 else 2, height, blocks, width)
        self._scratch = [scratch]
        self._chunks = []
        for first in range(0, rows, height):
            here = slice(first, min(first + height, rows))
            self._chunks.append(
                _Chunk(
                    target=target[here].view(-1, blocks, width),
                    wanted=wanted[here].view(-1, blocks, width),
                    gap=gap[here].view(-1, blocks, width),
                    residual=residual[here].view(-1, blocks, width),
                    signs=signs[:, here].view(planes, -1, blocks, width),
                    row=self.row[:, here],
                    col=self.col,
                    scratch=scratch[:, : here.stop - first],
                )
            )
        for plane in range(planes):
            for chunk in self._chunks:
                chunk.take_signs(plane)
            for _ in range(3):
                self._set_columns(plane, [chunk.rescale(plane) for chunk in self._chunks])
            for chunk in self._chunks:
                chunk.take_away(plane)
        for chunk in self._chunks:
            chunk.want_what_is()

    def leave(self) -> None:
        """`U = X + U - Z`, where X + U was what is wanted; `wanted` is then W + U."""
        self._of_chunks(_Chunk.leave)

    def add_product(self, pull: torch.Tensor) -> None:
        """After `leave`, `wanted` becomes X + U, with `X = W - (W - Z + U) pull`.

        Args:
            pull: `rho (H + rho I)^-1`, `[K, K]`, of `product_dtype`.
        """
        if pull.dtype == self.wanted.dtype:
            add_product(self.wanted, self._gap, pull)
            return
        product = product_float32(self._gap, pull) if pull.is_cuda else self._gap @ pull
        for chunk, rows in zip(self._chunks, product.split(len(self._chunks[0].wanted)), strict=True):
            chunk.add(rows)

    def project(self) -> None:
        """The nearest signs to `wanted` with the scales as they are, then each plane's scales in turn, as in ARB-RC."""
        self._set_columns(0, self._of_chunks(_Chunk.choose))
        for plane in range(1, len(self.row)):
            self._set_columns(plane, self._of_chunks(partial(_Chunk.choose_scales, plane=plane)))

    def _of_chunks(self, step: Callable[[_Chunk], Result]) -> list[Result]:
        """What a step gives of each chunk, in order. With spare threads each takes as many as the others: handing a
        chunk over takes as long as half of a step."""
        groups = min(spare_now() + 1, len(self._chunks))
        while len(self._scratch) < groups:
            self._scratch.append(torch.empty_like(self._scratch[0]))

        def run(group: int) -> list[Result]:
            results = []
            for chunk in self._chunks[group * len(self._chunks) // groups : (group + 1) * len(self._chunks) // groups]:
                chunk.scratch = self._scratch[group][:, : len(chunk.target)]
                results.append(step(chunk))
            return results

        return [result for some in in_parts(run, range(groups)) for result in some]

    def _set_columns(self, plane: int, sums: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Column scales by least squares, from the sums over the rows of each chunk."""
        if not self._col_scale:
            return
        numerator, denominator = sums[0]
        for more in sums[1:]:
            numerator += more[0]
            denominator += more[1]
        self.col[plane] = _divide(numerator, denominator[:, None])

    def reconstruction(self) -> torch.Tensor:
        """Z, float32 `[N, K]`."""
        parts = [chunk.reconstruction(torch.empty_like(chunk.wanted)).flatten(1) for chunk in self._chunks]
        return torch.cat(parts)[:, : self.wanted.shape[1]]

    def fits(self, size: torch.Tensor) -> list[PlanesFit]:
        """Block by block; `size` `[K]` is what the columns were scaled by."""
        width = self.col.shape[2]
        signs = torch.copysign(torch.ones_like(self._signs), self._signs).split(width, 2)
        row, col = self.row, self.col.flatten(1)[:, : len(size)]
        if self._col_scale:
            col = col / size
        else:
            row = row / size[0]
        return [
            PlanesFit(bits.contiguous(), row[:, :, index].contiguous(), scale.contiguous())
            for index, (bits, scale) in enumerate(zip(signs, col.split(width, 1), strict=True))
        ]


@dataclass
class _Chunk:
    """Some rows of everything, float32 `[n, blocks, width]`: steps that read and write nothing else.

    Attributes:
        target: W.
        wanted: X + U.
        gap: what the product takes, in its dtype.
        residual: what is wanted and not in Z; in between, without a plane that is being rescaled. Of one plane the same
            tensor as `wanted`.
        signs: `[P, n, blocks, width]`, +1 or -1; of one plane `wanted` itself, whose signs count.
        row: `[P, n, blocks]`.
        col: of all rows, `[P, blocks, width]`.
        scratch: `[P + 4, n, blocks, width]`, of one plane `[2, n, blocks, width]`; the same of all
            chunks that one thread goes over.
    """

    target: torch.Tensor
    wanted: torch.Tensor
    gap: torch.Tensor
    residual: torch.Tensor
    signs: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    scratch: torch.Tensor

    def take_signs(self, plane: int) -> None:
        """Those of the residual, which a plane alone has anyway."""
        if len(self.row) > 1:
            self.signs[plane].fill_(1.0).copysign_(self.residual)

    def want_what_is(self) -> None:
        """Z becomes what is wanted."""
        if len(self.row) == 1:
            self.wanted.copy_(self._term(0))
            return
        self.reconstruction(self.wanted)
        self.residual.copy_(self._term(-1))

    def leave(self) -> None:
        """`wanted` becomes `W + U`, with the new `U = wanted - Z`, and `gap` becomes `Z - W - U`."""
        near = self._term(-1)
        if len(self.row) == 1:
            self.wanted.sub_(near).add_(self.target)
        else:
            self.residual.sub_(near)
            torch.sub(self.wanted, self.residual, out=near)
            torch.add(self.residual, self.target, out=self.wanted)
        self.gap.copy_(near.sub_(self.wanted))

    def add(self, product: torch.Tensor) -> None:
        """A product `[n, K]` to what is wanted."""
        columns = product.shape[1]
        if product.dtype == self.wanted.dtype:
            self.wanted.flatten(1)[:, :columns].add_(product)
            return
        wide = self.scratch[0].flatten(1)[:, :columns].copy_(product)  # a sum of two dtypes is 6 times slower
        self.wanted.flatten(1)[:, :columns].add_(wide)

    def choose_signs(self) -> None:
        """Those nearest to what is wanted; the residual is then that without the first plane."""
        planes = len(self.row)
        if planes == 1:
            return
        goal, level, best, nearer = self.scratch[:4]
        sizes = [self._size(plane, self.scratch[4 + plane]) for plane in range(planes)]
        torch.abs(self.wanted, out=goal)
        # levels come in pairs of opposite sign: half of the patterns serve |wanted|, their sign is put right after
        for index, pattern in enumerate(islice(product((1.0, -1.0), repeat=planes), 2 ** (planes - 1))):
            level.copy_(sizes[0])
            for size, sign in zip(sizes[1:], pattern[1:], strict=True):
                level.add_(size, alpha=sign)
            distance = level.abs_().sub_(goal).abs_()
            if index == 0:
                best.copy_(distance)
                self.signs.fill_(1.0)
                continue
            torch.sub(best, distance, out=nearer).gt_(0)
            torch.minimum(best, distance, out=best)
            for signs, sign in zip(self.signs[1:], pattern[1:], strict=True):
                # arithmetic, since a choice by a mask is 10 times slower on a CPU
                torch.sub(signs, sign, out=level)
                signs.addcmul_(level, nearer, value=-1)
        level.copy_(sizes[0])
        for size, signs in zip(sizes[1:], self.signs[1:], strict=True):
            level.addcmul_(size, signs)
        self.signs[0].copysign_(level.mul_(self.wanted))
        self.residual.copy_(self.wanted)
        for size, signs in zip(sizes[1:], self.signs[1:], strict=True):
            self.residual.addcmul_(size, signs.mul_(self.signs[0]), value=-1)

    def choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`choose_signs`, and the first plane's `rescale`."""
        self.choose_signs()
        return self.rescale(0)

    def choose_scales(self, plane: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`rescale` of a plane after the one before it."""
        self.take_away(plane - 1)
        self.put_back(plane)
        return self.rescale(plane)

    def rescale(self, plane: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row scales by least squares; numerator `[blocks, width]` and denominator `[blocks]` of the column scales."""
        size, product = self.scratch[:2]
        if len(self.row) == 1:
            torch.abs(self.wanted, out=size)
        else:
            torch.mul(self.residual, self.signs[plane], out=size)
        col = self.col[plane]
        row = _divide(torch.mul(size, col, out=product).sum(2), col.square().sum(1))
        self.row[plane] = row
        return torch.mul(size, row[:, :, None], out=product).sum(0), row.square().sum(0)

    def take_away(self, plane: int) -> None:
        """From the residual; one plane leaves none."""
        if len(self.row) > 1:
            self.residual.sub_(self._term(plane))

    def put_back(self, plane: int) -> None:
        self.residual.add_(self._term(plane))

    def reconstruction(self, out: torch.Tensor) -> torch.Tensor:
        """Z of these rows."""
        out.copy_(self._term(0))
        for plane in range(1, len(self.row)):
            out.add_(self._term(plane))
        return out

    def _size(self, plane: int, out: torch.Tensor) -> torch.Tensor:
        return torch.mul(self.row[plane][:, :, None], self.col[plane], out=out)

    def _term(self, plane: int) -> torch.Tensor:
        """In the first scratch tensor."""
        size = self._size(plane, self.scratch[0])
        return size.copysign_(self.wanted) if len(self.row) == 1 else size.mul_(self.signs[plane])


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return numerator / torch.where(denominator > 0, denominator, 1.0)
