"""Work is cut so that every token meets every tile of keys that it may see, once; integers only."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import Chunk, block_tables, packed_step

from hpcinfer.kernels.gpu.graphs import padded
from hpcinfer.kernels.gpu.plan import PLAIN_ROWS, SPLIT, TILE, PlanKey, group_heads, plan_items
from hpcinfer.kernels.protocol import HeadLayout


@given(
    chunks=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 150)), max_size=5),
    group_size=st.integers(1, 16), window=st.sampled_from([0, 1, 64, 700, 2000]), rows=st.sampled_from([16, 64]),
)  # fmt: skip
def test_every_token_meets_its_tiles_once(chunks, group_size, window, rows):
    lengths = [start + count for start, count in chunks] or [1]
    chunks = [Chunk(s, start, start + count) for s, (start, count) in enumerate(chunks)] or [Chunk(0, 0, 1)]
    tables, _ = block_tables(lengths, 16)
    step = packed_step(chunks, [np.zeros(length, np.int64) for length in lengths], tables, 16)
    check(step, PlanKey(group_size, window, rows))


@given(
    contexts=st.lists(st.integers(1, 5000), min_size=1, max_size=5), times=st.integers(1, 32),
    group_size=st.integers(1, 16), window=st.sampled_from([0, 1, 700, 2000]), rows=st.sampled_from([16, 64]),
)  # fmt: skip
def test_a_token_that_is_there_several_times_meets_its_tiles_each_time(contexts, times, group_size, window, rows):
    chunks, (tables, _) = [Chunk(s, n - 1, n) for s, n in enumerate(contexts)], block_tables(contexts, 16)
    step = packed_step(chunks, [np.zeros(length, np.int64) for length in contexts], tables, 16)
    items = check(padded(step, len(contexts) + times - 1), PlanKey(group_size, window, rows))
    assert all(item[5] - item[4] <= SPLIT for item in items)  # none is walked by one program


def check(step, key):
    """Every token meets its tiles once, in items and parts as they should be; returns the items."""
    group_size, window, rows = key
    items, merged, num_partial = plan_items(step, key)
    met = {token: [] for token in range(len(step.positions))}
    written = np.zeros(num_partial, np.int64)
    for first, count, table, context, start, stop, part in items:
        assert count * group_size <= rows and start < stop
        assert table in step.table_starts and context in step.context_lens
        for token in range(first, first + count):
            met[token] += range(start, stop)
        if part >= 0:
            assert start // SPLIT == (stop - 1) // SPLIT
            written[part : part + count * group_size] += 1
    for token, tiles in met.items():
        position = step.positions[token]
        seen = range(max(position - window + 1, 0) // TILE if window else 0, position // TILE + 1)
        assert len(set(tiles)) == len(tiles) and set(seen) <= set(tiles)
    read = np.zeros_like(written)
    for _, count, start, num_splits in merged:
        read[start : start + count * group_size * num_splits] += 1
    assert (written == 1).all() and (read == 1).all()
    return items


def test_heads_share_programs_with_those_of_their_kv_head():
    layout = HeadLayout(8, 3, (3, 1, 0), (0, 0, 1, 1))
    groups = group_heads(layout, torch.device("cpu"))
    assert groups.columns.tolist() == [[0, 8], [16, 24]] and groups.kv_heads.tolist() == [0, 1]
    assert groups.head_columns.tolist() == [0, 8, 16, 24] and groups.num_columns == 72 and groups.is_padded
    many = group_heads(HeadLayout(8, 20, (20,), (0,) * 20), torch.device("cpu"))
    assert many.columns.shape == (2, PLAIN_ROWS) and many.columns[1].tolist()[4:] == [-1] * 12 and not many.is_padded
