"""Losses: all rank-seconds are somewhere, and each wait is where it belongs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import made_up_report

from hpcinfer.scaling.losses import (
    BUBBLES,
    COMMUNICATION,
    COMPUTING,
    IMBALANCE,
    OTHER,
    SHARES,
    SLOWER,
    START,
    STORAGE,
    rank_seconds,
    tell_slower,
)

PHASES = ("input and output", "waiting for work", "scheduling", "waiting for results", "waiting for the leader",
          "forward", "sampling", "pipeline", "waiting for weights", "a phase of tomorrow")  # fmt: skip

seconds = st.floats(0, 100)
ranks = st.fixed_dictionaries({
    "seconds": st.dictionaries(st.sampled_from(PHASES), seconds),
    "kernels": st.dictionaries(st.sampled_from(["products", "attention"]), seconds),
    "traffic": st.one_of(st.just({}), st.fixed_dictionaries({"seconds": seconds})),
    "timeline": st.one_of(st.just({}), st.fixed_dictionaries({"last_step_time": seconds})),
    "began": seconds,
    "place": st.one_of(st.none(), st.just({}), st.fixed_dictionaries({
        "replica": st.integers(0, 1), "pp": st.integers(1, 3), "tp": st.integers(1, 3)})),
})  # fmt: skip


@given(st.lists(ranks, min_size=1, max_size=4), st.floats(0.01, 100), st.floats(0, 10), st.floats(0, 50),
       st.floats(0, 1) | st.none())  # fmt: skip
def test_shares_add_up_to_all_rank_seconds(ranks, run_s, merge_s, more_s, least_s):
    wall_s = run_s + merge_s + more_s
    found = rank_seconds({"run": {"seconds": {"run": run_s, "merge": merge_s}}, "ranks": ranks}, wall_s)
    assert set(found) == set(SHARES) and min(found.values()) >= -1e-6
    assert sum(found.values()) == pytest.approx(len(ranks) * wall_s)
    shares = tell_slower(found, 100, least_s)
    assert sum(shares.values()) == pytest.approx(1) and list(shares) == list(SHARES)


def rank_of(place, **phases):
    return {"seconds": {name.replace("_", " "): value for name, value in phases.items()}, "kernels": {"products": 4.0},
            "place": place}  # fmt: skip


def losses_of(rank):
    return rank_seconds({"run": {"seconds": {"run": 9.0, "merge": 1.0}}, "ranks": [rank]}, 12.0)


def test_waiting_for_weights_is_input_although_it_is_inside_computing():
    found = losses_of(rank_of({"pp": 1, "tp": 1}, forward=7.0, waiting_for_weights=2.5))
    assert (found[COMPUTING], found[STORAGE], found[OTHER]) == (4.0, 3.5, 2.5)


def test_each_wait_is_where_it_belongs():
    phases = {"forward": 5.0, "sampling": 1.0, "input_and_output": 0.5, "waiting_for_work": 0.25, "scheduling": 0.125,
              "waiting_for_results": 1.0}  # fmt: skip
    staged, split, alone = (losses_of(rank_of({"pp": pp, "tp": tp}, **phases)) for pp, tp in ((2, 1), (1, 2), (1, 1)))
    for found in (staged, split, alone):
        assert (found[COMPUTING], found[STORAGE], found[IMBALANCE], found[START]) == (4.0, 1.5, 0.25, 2.0)
    assert (staged[COMMUNICATION], staged[BUBBLES], staged[OTHER]) == (0.0, 1.0, 3.25)
    assert (split[COMMUNICATION], split[BUBBLES], split[OTHER]) == (1.0, 0.0, 3.25)
    assert (alone[COMMUNICATION], alone[BUBBLES], alone[OTHER]) == (0.0, 0.0, 4.25)


def test_communication_is_what_was_measured_of_it():
    rank = {**rank_of({"pp": 1, "tp": 2}, forward=6.0), "traffic": {"seconds": 1.5}}
    found = losses_of(rank)
    assert (found[COMPUTING], found[COMMUNICATION], found[OTHER]) == (4.0, 1.5, 3.5)


def test_waiting_for_a_leader_without_work_is_imbalance():
    def losses(*ranks):
        return rank_seconds({"run": {"seconds": {"run": 9.0, "merge": 1.0}}, "ranks": ranks}, 12.0)

    place = {"replica": 1, "pp": 1, "tp": 2}
    follower = {**rank_of(place, forward=4.0, waiting_for_the_leader=3.0), "began": 50.0}  # by a clock of its own
    leader = {**rank_of(place, forward=4.0, waiting_for_work=2.0), "began": 100.0}
    assert losses(leader, follower)[COMMUNICATION] == 3.0
    led = {**leader, "timeline": {"last_step_time": 107.0}}  # two seconds before the end of the run
    found = losses(led, follower)
    assert (found[COMMUNICATION], found[IMBALANCE]) == (1.0, 4.0)  # the leader's own has been told already
    other = {**led, "place": {**place, "replica": 0}}
    assert losses(other, leader, follower)[COMMUNICATION] == 3.0  # another replica's end says nothing


def test_computing_beyond_that_of_the_base_point_is_told_apart():
    found = rank_seconds(made_up_report(2, 10.0, computing=0.6), 20.0)
    assert found[COMPUTING] == pytest.approx(12.0)
    shares = tell_slower(found, tokens=100, least_s=0.09)
    assert (shares[COMPUTING], shares[SLOWER]) == (pytest.approx(9 / 40), pytest.approx(3 / 40))
    assert tell_slower(found, tokens=100, least_s=1.0)[SLOWER] == 0
