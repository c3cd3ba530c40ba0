import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.kernels.protocol import StepInput
from hpcinfer.model.halves import halves, pieces


def step_of(queries, blocks):
    """A batch of sequences with so many queries and blocks each, every number its place."""
    starts, tables = (np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) for counts in (queries, blocks))
    tokens = np.arange(starts[-1])
    return StepInput(tokens, tokens + 1, tokens + 2, starts, np.arange(len(queries)), np.arange(tables[-1]), tables,
                     tokens[-1:])  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 5)), min_size=1, max_size=12))
def test_two_halves_hold_all_sequences_in_order_and_are_as_even_as_can_be(sequences):
    queries, blocks = zip(*sequences, strict=True)
    step = step_of(queries, blocks)
    parts = halves(step)
    assert len(parts) == min(2, len(sequences))
    for name in ("token_ids", "positions", "slots", "context_lens", "block_tables"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(step, name).tolist(), name
    for name in ("query_starts", "table_starts"):
        counts = np.concatenate([np.diff(getattr(part, name)) for part in parts])
        assert counts.tolist() == np.diff(getattr(step, name)).tolist(), name
    for part in parts:
        assert part.query_starts[0] == part.table_starts[0] == 0
        assert part.query_starts[-1] == len(part.token_ids) > 0 and part.table_starts[-1] == len(part.block_tables)
        assert all(each.dtype == np.int64 and each.flags.c_contiguous for each in vars(part).values())
    if len(parts) == 2:
        ends = np.cumsum(queries)[:-1]
        assert abs(2 * len(parts[0].token_ids) - sum(queries)) == min(abs(2 * end - sum(queries)) for end in ends)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 5)), min_size=1, max_size=3))
def test_pieces_end_with_one_token_each(sequences):
    step = step_of(*zip(*sequences, strict=True))
    todo, done = [step], []
    while todo:
        part = todo.pop(0)
        cut = pieces(part)
        todo, done = (cut + todo, done) if len(cut) > 1 else (todo, [*done, part])
    assert [part.positions.tolist() for part in done] == [[position] for position in step.positions]
    owner = np.repeat(np.arange(len(sequences)), np.diff(step.query_starts))
    for part, sequence in zip(done, owner, strict=True):
        assert part.query_starts.tolist() == [0, 1] and part.table_starts.tolist() == [0, sequences[sequence][1]]
        assert part.block_tables.tolist() == list(range(*step.table_starts[sequence : sequence + 2]))
        assert part.token_ids + 2 == part.slots == part.positions + 1


def test_a_chunk_sees_what_is_before_it_and_itself():
    step = StepInput(*(np.arange(10, 15) for _ in range(3)), np.array([0, 5]), np.array([15]), np.arange(2),
                     np.array([0, 2]), np.array([4]))  # fmt: skip
    first, second = pieces(step)
    assert first.context_lens.tolist() == [12] and second.context_lens.tolist() == [15]
    assert first.positions.tolist() == [10, 11] and second.positions.tolist() == [12, 13, 14]
