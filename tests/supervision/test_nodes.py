"""Nodes: counting room, placing steps, leaving out what fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.errors import ConfigError
from hpcinfer.supervision.nodes import Node, Roster, Seat, count_places, is_down, parse_counts, parse_nodes, place

FREE = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5))


@given(FREE, st.integers(1, 12))
def test_step_gets_its_ranks_within_the_room_or_none(free, ranks):
    placement = place(free, ranks)
    if placement is None:
        assert sum(free.values()) < ranks
        return
    assert sum(seat.ranks for seat in placement) == ranks
    assert all(0 < seat.ranks <= free[seat.node] for seat in placement)
    assert len({seat.node for seat in placement}) == len(placement)
    fewest = next(n for n in range(1, 7) if sum(sorted(free.values())[-n:]) >= ranks)
    assert len(placement) == fewest


@given(FREE, st.integers(1, 6))
def test_all_places_fit_at_once(free, ranks):
    nodes = [Node(name, slots) for name, slots in free.items()]
    count = count_places(nodes, ranks)
    assert count == sum(free.values()) // ranks
    roster = Roster(nodes)
    assert all(roster.take(ranks) for _ in range(count))
    assert roster.take(ranks) is None


def test_steps_spread_over_nodes():
    roster = Roster([Node("a", 4), Node("b", 4)])
    assert [roster.take(2)[0].node for _ in range(4)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(("text", "counts"), [
    ("4(x2),3", [4, 4, 3]), ("1", [1]), ("2,1(x3)", [2, 1, 1, 1]), ("", []), ("16(x2)", [16, 16]),
])
def test_counts_of_slurm(text, counts):
    assert parse_counts(text) == counts


@pytest.mark.parametrize("state", [
    "DOWN", "DOWN*", "IDLE*", "ALLOCATED*", "DOWN+DRAIN", "FAIL", "ALLOCATED+FAIL", "MIXED+NOT_RESPONDING", "UNKNOWN",
    "IDLE+POWERING_DOWN", "down*+drain",
])
def test_states_in_which_a_node_is_down(state):
    assert is_down(state)


@pytest.mark.parametrize("state", ["IDLE", "ALLOCATED", "MIXED", "ALLOCATED+DRAIN", "MIXED+MAINTENANCE", "COMPLETING"])
def test_states_in_which_steps_can_run(state):
    assert not is_down(state)


def test_nodes_of_the_user():
    assert parse_nodes("a,b:4, c", None) == [Node("a", 1), Node("b", 4), Node("c", 1)]
    assert parse_nodes("a,b:4", 2) == [Node("a", 2), Node("b", 4)]
    for wrong in ("", "a,,b", "a:0", "a:x", "a b", "a,a:2"):
        with pytest.raises(ConfigError):
            parse_nodes(wrong, None)


def test_only_the_node_that_is_down_is_suspected():
    roster = Roster([Node("a", 1), Node("b", 1), Node("c", 2)])
    both = (Seat("a", 1), Seat("b", 1))
    roster.set_down(["a", "not ours"])
    for _ in range(3):
        roster.strike(both)
    assert roster.left_out == ["a"] and roster.is_down(both)
    roster.set_down([])
    assert roster.take(2) == (Seat("c", 2),) and roster.take(1) == (Seat("b", 1),) and roster.take(1) is None


def test_work_clears_a_node():
    roster, seat = Roster([Node("a", 1), Node("b", 1)]), (Seat("a", 1),)
    for _ in range(5):
        roster.strike(seat)
        roster.strike(seat)
        roster.praise(seat)
    assert roster.left_out == []


def test_nodes_left_out_are_the_last_resort():
    roster = Roster([Node("a", 1), Node("b", 1)])
    roster.bar((Seat("a", 1),))
    assert roster.take(1) == (Seat("b", 1),) and roster.take(1) is None
    roster.set_down(["b"])
    assert roster.take(1) == (Seat("a", 1),)
    roster = Roster([Node("a", 1), Node("b", 1)])
    roster.bar((Seat("a", 1),))
    assert roster.take(2) is not None


def test_dropped_node_is_not_taken():
    roster = Roster([Node("a", 1), Node("b", 1)])
    roster.drop(["a"])
    assert roster.names == ["b"] and roster.idle == ["b"] and not roster.has_room(2)
