import pytest

from hpcinfer.partition.grains import grain_runs
from hpcinfer.partition.heads import needed_kv_heads, query_heads

SHAPES = [(32, 8), (32, 32), (32, 1), (14, 2), (4, 2), (2, 2), (1, 1), (24, 3), (40, 40)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
@pytest.mark.parametrize("tp", range(1, 9))
def test_ranks_hold_exactly_the_kv_heads_that_their_queries_read(num_heads, num_kv_heads, tp):
    group = num_heads // num_kv_heads
    heads = [query_heads(num_heads, 8, run) for run in grain_runs(8, tp)]
    assert [head for each in heads for head in each] == list(range(num_heads))
    for each in heads:
        assert list(needed_kv_heads(num_heads, num_kv_heads, each)) == sorted({head // group for head in each})


def test_fourteen_heads_over_eight_grains_share_two_kv_heads():
    heads = [query_heads(14, 8, run) for run in grain_runs(8, 4)]
    assert heads == [range(0, 4), range(4, 8), range(8, 12), range(12, 14)]
    assert [needed_kv_heads(14, 2, each) for each in heads] == [range(0, 1), range(0, 2), range(1, 2), range(1, 2)]


def test_one_kv_head_is_on_every_rank():
    assert {needed_kv_heads(32, 1, query_heads(32, 8, run)) for run in grain_runs(8, 8)} == {range(0, 1)}


def test_rank_without_query_heads_needs_no_kv_head():
    heads = query_heads(4, 8, range(5, 8))
    assert not heads and needed_kv_heads(4, 2, heads) == range(0)
