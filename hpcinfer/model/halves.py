"""Two parts of a batch, where sums of one travel while the other is computed, or there is no memory for both.

No row depends on others: no bit changes.
"""

import numpy as np

from hpcinfer.kernels.protocol import StepInput


def halves(step: StepInput) -> list[StepInput]:
    """Cut a batch between two sequences, as near to the middle of its tokens as possible; a single one stays whole.

    Not collective. Logits are asked for of the whole batch, not of its halves.
    """
    starts = step.query_starts
    if len(starts) < 3:
        return [step]
    middle = 1 + int(np.abs(2 * starts[1:-1] - starts[-1]).argmin())
    return [_part(step, 0, middle), _part(step, middle, len(starts) - 1)]


def pieces(step: StepInput) -> list[StepInput]:
    """Cut a batch as `halves` does, and a single sequence into two chunks, the first to be computed first.

    Not collective. One token stays whole. Logits are asked for of the whole batch.
    """
    num_tokens = len(step.positions)
    if len(step.context_lens) > 1 or num_tokens < 2:
        return halves(step)
    middle = num_tokens // 2
    return [_chunk(step, 0, middle), _chunk(step, middle, num_tokens)]


def _chunk(step: StepInput, start: int, stop: int) -> StepInput:
    """Some tokens of a batch of one sequence."""
    return StepInput(
        token_ids=step.token_ids[start:stop],
        positions=step.positions[start:stop],
        slots=step.slots[start:stop],
        query_starts=np.array([0, stop - start]),
        context_lens=step.positions[stop - 1 : stop] + 1,
        block_tables=step.block_tables,
        table_starts=step.table_starts,
        logit_tokens=step.logit_tokens[:0],
    )


def _part(step: StepInput, first: int, last: int) -> StepInput:
    """Some sequences of a batch."""
    tokens = slice(step.query_starts[first], step.query_starts[last])
    blocks = slice(step.table_starts[first], step.table_starts[last])
    return StepInput(
        token_ids=step.token_ids[tokens],
        positions=step.positions[tokens],
        slots=step.slots[tokens],
        query_starts=step.query_starts[first : last + 1] - tokens.start,
        context_lens=step.context_lens[first:last],
        block_tables=step.block_tables[blocks],
        table_starts=step.table_starts[first : last + 1] - blocks.start,
        logit_tokens=step.logit_tokens[:0],
    )
