from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import SamplingParams
from hpcinfer.engine.batch import build_batch
from hpcinfer.engine.request import Request
from hpcinfer.engine.scheduler import Work
from hpcinfer.engine.sequence import Sequence


def work(seq_id, length, start, stop, block_size, *, scores=False, max_tokens=4):
    params = SamplingParams(echo=scores, logprobs=0 if scores else None, max_tokens=max_tokens)
    sequence = Sequence(seq_id, Request(seq_id, tuple(100 * seq_id + i for i in range(length)), params), 0)
    sequence.blocks = array("q", [50 * seq_id + 3 * i for i in range(-(-stop // block_size))])
    return Work.of(sequence, start, stop)


@given(data=st.data(), block_size=st.sampled_from([1, 3, 16]))
def test_batches_pack_the_tokens_of_their_works(data, block_size):
    works = []
    for seq_id in range(data.draw(st.integers(1, 5))):
        length = data.draw(st.integers(1, 40))
        start = data.draw(st.integers(0, length - 1))
        works.append(work(seq_id, length, start, data.draw(st.integers(start + 1, length)), block_size))
    batch = build_batch(works, block_size)
    step = batch.step
    assert batch.works == works and batch.num_tokens == step.query_starts[-1]
    for i, (sequence, start, stop, _) in enumerate(works):
        mine = slice(step.query_starts[i], step.query_starts[i + 1])
        assert step.positions[mine].tolist() == list(range(start, stop))
        assert step.token_ids[mine].tolist() == sequence.token_ids[start:stop]
        expected = [sequence.blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        assert step.slots[mine].tolist() == expected
        table = step.block_tables[step.table_starts[i] : step.table_starts[i + 1]]
        assert step.context_lens[i] == stop and table.tolist() == sequence.blocks.tolist()
    assert step.table_starts[-1] == len(step.block_tables)
    for each in vars(step).values():
        assert each.dtype == np.int64 and each.flags.c_contiguous and each.flags.writeable


def test_only_the_last_token_of_a_whole_sequence_is_sampled_from():
    works = [work(1, 10, 0, 10, 4), work(2, 10, 0, 6, 4), work(3, 10, 9, 10, 4)]
    batch = build_batch(works, 4)
    assert [(row.sequence.seq_id, row.position, row.samples) for row in batch.rows] == [(1, 9, True), (3, 9, True)]
    assert batch.step.logit_tokens.tolist() == [9, 16]


def test_prompts_are_scored_up_to_their_last_token_and_then_sampled_from():
    whole, part = work(1, 4, 0, 4, 4, scores=True), work(2, 6, 2, 5, 4, scores=True)
    part.sequence.num_scored = 3
    rows = build_batch([part, whole], 4)
    assert [(row.sequence.seq_id, row.position, row.samples) for row in rows.rows] == [
        (2, 2, False), (2, 3, False), (2, 4, False), (1, 0, False), (1, 1, False), (1, 2, False), (1, 3, True),
    ]  # fmt: skip
    assert rows.step.logit_tokens.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_what_was_scored_before_a_preemption_is_not_scored_again():
    again = work(1, 8, 0, 8, 4, scores=True)
    again.sequence.num_scored = 6
    assert [row.position for row in build_batch([again], 4).rows if not row.samples] == [5, 6]


@pytest.mark.parametrize("length", [1, 5])
def test_scoring_alone_samples_nothing(length):
    batch = build_batch([work(1, length, 0, length, 4, scores=True, max_tokens=0)], 4)
    assert len(batch.rows) == length - 1 == len(batch.step.logit_tokens) and not any(row.samples for row in batch.rows)


def test_works_know_how_many_rows_they_have():
    works = [work(1, 9, 0, 9, 4, scores=True), work(2, 9, 2, 5, 4, scores=True), work(3, 9, 0, 9, 4),
             work(4, 9, 0, 5, 4), work(5, 9, 3, 9, 4, scores=True, max_tokens=0)]  # fmt: skip
    sequences = [row.sequence for row in build_batch(works, 4).rows]
    assert [each.num_rows for each in works] == [sequences.count(each.sequence) for each in works] == [9, 3, 1, 0, 5]
