"""A batch: the works of one step as the packed integers that kernels read, and which logits are wanted."""

from itertools import chain
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

    @property
    def num_output(self) -> int:
        """Output tokens up to this one, known or not."""
        return self.position + 1 - self.sequence.num_prompt


class Batch(NamedTuple):
    """What one step computes."""

    works: list[Work]
    step: StepInput
    rows: list[LogitRow]

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.step.token_ids)


def build_batch(works: list[Work], block_size: int, before: Batch | None = None) -> Batch:
    """Pack works, at least one, in order.

    Args:
        works: of the batch.
        block_size: tokens of a KV block.
        before: the last batch, if it is in flight and samples tokens that this one is to compute.
    """
    sequences, starts, stops, _ = zip(*works, strict=True)
    first, last = np.array(starts, np.int64), np.array(stops, np.int64)
    counts = last - first
    query_starts = _running_sum(counts)
    table_starts = _running_sum([len(sequence.blocks) for sequence in sequences])
    tables = np.frombuffer(bytearray().join(sequence.blocks for sequence in sequences), np.int64)
    offsets = query_starts[:-1] - first  # from a position to its token in the batch
    positions = np.arange(query_starts[-1]) - np.repeat(offsets, counts)
    entries = np.repeat(table_starts[:-1], counts) + positions // block_size
    rows, logit_tokens = _logit_rows(works, offsets.tolist())
    step = StepInput(
        token_ids=_token_ids(works, len(positions), _kept_ids(before)),
        positions=positions,
        slots=tables[entries] * block_size + positions % block_size,
        query_starts=query_starts,
        context_lens=last,
        block_tables=tables,
        table_starts=table_starts,
        logit_tokens=np.array(logit_tokens, np.int64),
    )
    return Batch(works, step, rows)


def _running_sum(counts: list[int] | np.ndarray) -> np.ndarray:
    """Where each one begins, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _token_ids(works: list[Work], num_tokens: int, kept: dict[int, list[int]]) -> np.ndarray:
    parts = (sequence.token_ids[start:stop] or kept[sequence.seq_id] for sequence, start, stop, _ in works)
    return np.fromiter(chain.from_iterable(parts), np.int64, num_tokens)


def _kept_ids(batch: Batch | None) -> dict[int, list[int]]:
    """What stands for the tokens that a batch samples (see `StepInput`), by seq_id."""
    rows = batch.rows if batch is not None else []
    return {row.sequence.seq_id: [-1 - place] for place, row in enumerate(rows) if row.samples}


def _logit_rows(works: list[Work], offsets: list[int]) -> tuple[list[LogitRow], list[int]]:
    """Which logits are wanted, and of which tokens of the batch."""
    rows: list[LogitRow] = []
    tokens: list[int] = []
    for work, offset in zip(works, offsets, strict=True):
        sequence, _, stop, samples = work
        if sequence.num_scored < sequence.num_prompt:
            rows += [LogitRow(sequence, position, False) for position in work.scored]
            tokens += [offset + position for position in work.scored]
        if samples:
            rows.append(LogitRow(sequence, stop - 1, True))
            tokens.append(offset + stop - 1)
    return rows, tokens
