"""A batch: the works of one step as the packed integers that kernels read, and which logits are wanted."""

from typing import NamedTuple

import numpy as np

from hpcinfer.engine.scheduler import Work
from hpcinfer.engine.sequence import Sequence
from hpcinfer.kernels.protocol import StepInput


class LogitRow(NamedTuple):
    """One row of logits that is wanted."""

    sequence: Sequence
    position: int  # of the token that the logits come from
    samples: bool  # whether the next token is to be sampled; else the next prompt token is scored


class Batch(NamedTuple):
    """What one step computes."""

    works: list[Work]
    step: StepInput
    rows: list[LogitRow]

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.step.token_ids)


def build_batch(works: list[Work], block_size: int) -> Batch:
    """Pack works, in order."""
    counts = [work.stop - work.start for work in works]
    starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    tables = tuple(np.asarray(work.sequence.blocks, np.int64) for work in works)
    positions = [np.arange(work.start, work.stop, dtype=np.int64) for work in works]
    slots = [t[p // block_size] * block_size + p % block_size for t, p in zip(tables, positions, strict=True)]
    rows = [row for work in works for row in _rows(work)]
    step = StepInput(
        token_ids=np.concatenate([_ids(work) for work in works]),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_starts=starts,
        context_lens=np.asarray([work.stop for work in works], np.int64),
        block_tables=tables,
        logit_tokens=_logit_tokens(works, starts),
    )
    return Batch(works, step, rows)


def _ids(work: Work) -> np.ndarray:
    return np.asarray(work.sequence.token_ids[work.start : work.stop], np.int64)


def _rows(work: Work) -> list[LogitRow]:
    rows = [LogitRow(work.sequence, position, False) for position in work.scored]
    return rows + [LogitRow(work.sequence, work.stop - 1, True)] * work.samples


def _logit_tokens(works: list[Work], starts: np.ndarray) -> np.ndarray:
    offsets = [int(start) - work.start for work, start in zip(works, starts, strict=False)]
    tokens = [offset + row.position for work, offset in zip(works, offsets, strict=True) for row in _rows(work)]
    return np.asarray(tokens, np.int64)
