from statistics import median_low

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.report.slow_ranks import Pace, SlowRank, paces, slow_ranks


def pace(rank=0, seconds=10.0, **values):
    base = {"host": f"n{rank}", "replica": 0, "pp_rank": 0, "tp_rank": rank, "share": 0.5, "steps": 10, "tokens": 1000}
    return Pace(**{**base, "rank": rank, "seconds": seconds, **values})


def names(found):
    return [(slow.rank, slow.peers.split()[1]) for slow in found]


def test_slow_rank_of_a_stage_is_named():
    (slow,) = slow_ranks([pace(0), pace(1, 21.0), pace(2)])
    assert slow == SlowRank(1, "n1", 2.1, "its tensor-parallel peers")
    assert str(slow) == "rank 1 on n1 takes 2.1 times as long to compute as its tensor-parallel peers"


@pytest.mark.parametrize("seconds", [10.0, 14.9, 7.0])
def test_small_differences_are_not(seconds):
    assert not slow_ranks([pace(0), pace(1, seconds)])


def test_rank_with_more_to_compute_is_not_slow():
    assert not slow_ranks([pace(0, 20.0, share=2 / 3), pace(1, 10.0, share=1 / 3)])
    assert not slow_ranks([pace(0, 20.0, tokens=2000), pace(1, 10.0)])  # it joined later


def test_nothing_is_said_of_a_short_run_or_of_kernels_without_a_clock():
    assert not slow_ranks([pace(0, 1.0), pace(1, 4.9)])
    assert not slow_ranks([pace(0, 0.0), pace(1, 10.0)])
    assert not slow_ranks([pace(0, tokens=0), pace(1, 100.0)])
    assert not slow_ranks([pace(0, 100.0)]) and not slow_ranks([])


def test_replicas_are_compared_where_they_do_alike():
    alike = [pace(rank, replica=rank, tp_rank=0, share=1.0) for rank in range(4)]
    assert names(slow_ranks([*alike, pace(4, 25.0, replica=4, tp_rank=0, share=1.0)])) == [(4, "like")]
    for unlike in ({"steps": 200}, {"pp_rank": 1}):  # small batches cost more per token; another stage
        assert not slow_ranks([*alike, pace(4, 25.0, replica=4, tp_rank=0, share=1.0, **unlike)])


def test_each_is_named_once_with_the_larger_factor():
    others = [pace(2 * i + j, replica=i, tp_rank=j) for i in range(1, 4) for j in range(2)]
    found = slow_ranks([pace(0, 40.0), pace(1, 20.0), *others])
    assert [(slow.rank, slow.factor) for slow in found] == [(0, 4.0), (1, 2.0)]


@given(st.lists(st.floats(5.0, 100.0), min_size=2, max_size=9))
def test_slow_are_those_above_the_median_of_the_others(seconds):
    found = {slow.rank for slow in slow_ranks(pace(rank, each) for rank, each in enumerate(seconds))}
    others = [seconds[:i] + seconds[i + 1 :] for i in range(len(seconds))]
    clear = [each / median_low(rest) for each, rest in zip(seconds, others, strict=True)]
    assert found == {rank for rank, factor in enumerate(clear) if factor >= 1.5}


def test_paces_are_read_from_reports():
    place = {"replica": 5, "pp": 2, "tp": 1, "pp_rank": 1, "tp_rank": 0, "share": 0.5}
    report = {"rank": 2, "host": "n", "place": place, "kernels": {"products": 2.0, "other": 1.0},
              "counts": {"steps": 3, "tokens": 40}}  # fmt: skip
    assert list(paces([{"rank": 0}, {"rank": 1, "place": {}}, report])) == [Pace(2, "n", 5, 1, 0, 0.5, 3.0, 3, 40)]
