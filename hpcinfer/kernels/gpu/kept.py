"""Ids that were chosen on a GPU, kept there for the next batch: the host need not know them to enqueue it."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hpcinfer.kernels.gpu.step import to_device

NUM_KEPT = 1 << 18  # a megabyte: rows of logits of any batch
_BLOCK = 128


class KeptIds:
    """Ids in memory that never moves, as recordings need it. What is enqueued later finds those of the last batch."""

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.zeros(NUM_KEPT, dtype=torch.int32, device=device)

    def keep(self, ids: Tensor, rows: list[int]) -> None:
        """Keep an id at each row; rows ascend."""
        if rows[-1] < len(rows):
            self._ids[: len(rows)].copy_(ids)
            return
        [places] = to_device([np.array(rows, np.int32)], self._ids.device)
        self._ids.index_copy_(0, places.long(), ids.int())

    def find(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """Rows int32 [T] of a vocabulary table.

        Args:
            token_ids: int32 [T]; below 0: -1 - row of a kept id.
            rows: int32, by id; the last one is for all ids that are larger.
        """
        out, count = torch.empty_like(token_ids), len(token_ids)
        if count:
            _find_kernel[(triton.cdiv(count, _BLOCK),)](
                token_ids, self._ids, rows, out, count, len(rows) - 1, BLOCK=_BLOCK
            )
        return out


@triton.jit(do_not_specialize=["count", "last"])
def _find_kernel(
    token_ids: tensor, kept: tensor, rows: tensor, out: tensor, count: tensor, last: tensor, BLOCK: constexpr
) -> None:
    """rows[id] of each id, or of the kept one that it stands for."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    ids = tl.load(token_ids + places, mask=is_inside, other=0)
    is_kept = ids < 0
    ids = tl.where(is_kept, tl.load(kept - 1 - ids, mask=is_kept, other=0), ids)
    tl.store(out + places, tl.load(rows + tl.minimum(ids, last), mask=is_inside, other=0), mask=is_inside)
