"""Matrix products of one fixed shape, so that a row of the result can depend on nothing but its row.

Rows go through the matrix library in tiles of exactly 16, the last one filled with zero rows; all sizes are padded to
multiples of 16 and every tile is aligned. That the library then treats all rows of a tile alike is probed for each
shape; where it does not, a product is an elementwise multiplication and a tree of adds, one row at a time.
"""

import functools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcinfer.dtypes import to_float32
from hpcinfer.kernels.reference_math import tree_sum_
from hpcinfer.partition.split import align_up

logger = logging.getLogger(__name__)

ROWS = 16  # rows of a tile
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class GrainWeight:
    """The grains of a weight, each [O, I] and contiguous; O and I padded to multiples of ROWS."""

    grains: Tensor  # float32 [G, O, I]
    transposed: tuple[Tensor, ...]  # views of it, [I, O] each
    num_out: int  # without padding
    num_in: int
    is_tiled: bool  # in tiles of ROWS rows; else row by row


def prepare(values: np.ndarray, dtype: str) -> GrainWeight:
    """Copy a stored weight [G, U_out, U_in] into products' shape."""
    num_grains, num_out, num_in = values.shape
    grains = torch.zeros(num_grains, align_up(num_out, ROWS), align_up(num_in, ROWS))
    for target, grain in zip(grains.numpy(), values, strict=True):
        target[:num_out, :num_in] = to_float32(grain, dtype)
    transposed = tuple(grain.t() for grain in grains)
    return GrainWeight(grains, transposed, num_out, num_in, rows_are_alike(grains.shape[1], grains.shape[2]))


def as_tiles(x: Tensor, size: int) -> Tensor:
    """[G, T, I] with T a multiple of ROWS, I grown to `size`, contiguous and aligned; zeros are added."""
    num_grains, num_rows, num_in = x.shape
    full_rows = align_up(num_rows, ROWS)
    is_whole = num_rows == full_rows and num_in == size
    if is_whole and x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    tiles = torch.empty(num_grains, full_rows, size)
    tiles[:, :num_rows, :num_in] = x
    tiles[:, num_rows:] = 0
    tiles[:, :, num_in:] = 0
    return tiles


def grain_products(tiles: Tensor, weight: GrainWeight) -> Tensor:
    """Multiply each grain by its rows, or by the same rows for all: [G or 1, T, I] gives [G, T, O]."""
    num_grains, num_out, num_in = weight.grains.shape
    result = torch.empty(num_grains, tiles.shape[1], num_out)
    if not result.numel():
        return result
    if not weight.is_tiled:
        return _products_by_row(tiles, weight, result)
    inputs = tiles.view(-1, ROWS, num_in).unbind(0)
    outputs = result.view(num_grains, -1, ROWS, num_out).unbind(0)
    num_tiles = tiles.shape[1] // ROWS
    for grain, (transposed, targets) in enumerate(zip(weight.transposed, outputs, strict=True)):
        first = grain * num_tiles if tiles.shape[0] > 1 else 0
        for x, target in zip(inputs[first : first + num_tiles], targets.unbind(0), strict=True):
            torch.mm(x, transposed, out=target)
    return result


def _products_by_row(tiles: Tensor, weight: GrainWeight, result: Tensor) -> Tensor:
    for grain, rows, targets in zip(weight.grains, tiles.expand(len(weight.grains), -1, -1), result, strict=True):
        for row, target in zip(rows, targets, strict=True):
            target.copy_(tree_sum_(grain * row))
    return result


def batched_product(a: Tensor, b: Tensor, *, is_tiled: bool) -> Tensor:
    """[B, ROWS, I] times [B, I, O], B a multiple of ROWS; always ROWS products a call."""
    if not is_tiled:
        return torch.stack([tree_sum_(x.unsqueeze(1) * y.t()) for x, y in zip(a, b, strict=True)])
    result = torch.empty(a.shape[0], ROWS, b.shape[2])
    for x, y, target in zip(a.split(ROWS), b.split(ROWS), result.split(ROWS), strict=True):
        torch.bmm(x, y, out=target)
    return result


@functools.cache
def rows_are_alike(num_out: int, num_in: int) -> bool:
    """Probe a product's shape: a row has the same bits at every place of the tile, whatever the other rows are."""
    generator = torch.Generator().manual_seed(num_out * 65537 + num_in)
    transposed = torch.randn(num_out, num_in, generator=generator).t()
    row, others = torch.randn(1, num_in, generator=generator), torch.randn(ROWS, num_in, generator=generator)
    same = torch.mm(row.repeat(ROWS, 1), transposed)
    is_alike = torch.equal(same, same[:1].expand(ROWS, -1))
    for place in (0, 1, ROWS // 2, ROWS - 1):
        others[place] = row
        is_alike = is_alike and torch.equal(torch.mm(others, transposed)[place], same[0])
    if not is_alike:
        logger.warning("products of %d x %d depend on the row's place here: one row at a time, slowly", num_out, num_in)
    return is_alike


@functools.cache
def batches_are_alike(num_in: int, num_out: int) -> bool:
    """The same of `batched_product`: a row has the same bits at every place of the batch."""
    generator = torch.Generator().manual_seed(num_out * 65537 + num_in)
    a = torch.randn(1, ROWS, num_in, generator=generator).repeat(ROWS, 1, 1)
    b = torch.randn(1, num_in, num_out, generator=generator).repeat(ROWS, 1, 1)
    a[:, 1::2] = a[:1, :1]  # every other row is the first one
    result = batched_product(a, b, is_tiled=True)
    is_alike = torch.equal(result, result[:1].expand(ROWS, -1, -1))
    is_alike = is_alike and torch.equal(result[:, 1::2], result[:, :1].expand(-1, ROWS // 2, -1))
    if not is_alike:
        logger.warning("attention products of head size %d depend on place here: one at a time, slowly", num_in)
    return is_alike
