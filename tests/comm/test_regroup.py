"""How survivors agree: simulated, with any rank dying at any call, and for real under a fault-tolerant MPI."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jobs import fault_tolerance, start_mpi
from mortal_ranks import Hang, Network

from hpcinfer.comm import regroup as regroup_module
from hpcinfer.comm.regroup import Decision, View, answer_invitation, found, regroup

TAG_JOIN, TAG_INVITE = 31, 33  # of messages that wake a spare rank
TOLD_TOO_LATE = {  # scenes in which a coordinator dies while it tells the others
    "one of two that are left out": (26837, 4, 2, {0: 15, 5: 3, 1: 1}, 1),
    "one that goes on, of three": (424, 4, 1, {0: 8, 3: 1}, 2),
}


def as_spare(line, view):
    """Wait for a moment as a spare rank does."""
    line.rest(TAG_JOIN, TAG_INVITE)
    return answer_invitation(line, view)


def simulate(monkeypatch, seed, members, spares, deaths, wanted):
    """Let members work until some die and the others have regrouped; gives the last view of those that live."""
    network = Network(members + spares, seed, deaths)
    monkeypatch.setattr(regroup_module, "time", network)
    first, others = tuple(range(members)), range(members, members + spares)
    views = {line.rank: View(1, first if line.rank < members else (), b"0") for line in network.lines}

    def main(line):
        def decide(offers, guests):
            best = max(int(offer) for offer in offers.values() if offer)
            chosen = [*offers, *guests.invite(others, wanted - len(offers))]
            return Decision(tuple(chosen[:wanted]), str(best).encode())

        view, pause = views[line.rank], line.pause()
        offer = 100 + line.rank  # the higher, the more it knows
        while True:
            pause()
            new = None
            if line.rank not in view.members:
                new = as_spare(line, view)
            elif not line.failed() & set(view.members):
                line.rest()
            else:
                line.wake()
                new = regroup(line, view, str(offer).encode(), decide)
                assert line.rank not in new.members or int(new.plan) >= offer
            if new is not None:
                assert new.epoch > view.epoch
                view = views[line.rank] = new
                offer = int(new.plan or 0)

    network.run(main)
    return {rank: view for rank, view in views.items() if rank not in network.dead}


@st.composite
def scenes(draw):
    members, spares = draw(st.integers(2, 4)), draw(st.integers(0, 2))
    size = members + spares
    victims = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=size - 1))
    soon = draw(st.sampled_from([30, 120, 400]))
    deaths = {rank: draw(st.integers(1, soon)) for rank in victims}
    return draw(st.integers(0, 2**32)), members, spares, deaths, draw(st.integers(1, members))


@pytest.mark.parametrize("num_examples", [300])
def test_survivors_share_one_view_or_are_spare_whoever_dies_whenever(monkeypatch, num_examples):
    @settings(max_examples=num_examples)
    @given(scene=scenes())
    @example(TOLD_TOO_LATE["one of two that are left out"])
    @example(TOLD_TOO_LATE["one that goes on, of three"])
    def check(scene):
        last = simulate(monkeypatch, *scene)
        for rank, view in last.items():
            if rank in view.members:
                assert all(last[other] == view for other in view.members), (rank, last)

    check()


def test_the_simulation_notices_who_waits_for_ever():
    with pytest.raises(Hang, match=r"\[1\]"):
        Network(2, 0, {}).run(lambda line: line.rest() if line.rank == 0 else wait_for_nothing(line))


def wait_for_nothing(line):
    pause = line.pause()
    while True:
        pause()


def test_without_a_death_in_between_all_survivors_go_on_in_their_order(monkeypatch):
    for seed in range(20):
        last = simulate(monkeypatch, seed, 4, 0, {1: 20}, 4)
        assert last == dict.fromkeys((0, 2, 3), View(2, (0, 2, 3), b"103"))


def test_a_spare_rank_takes_the_dead_one_s_place(monkeypatch):
    for seed in range(20):
        last = simulate(monkeypatch, seed, 3, 2, {0: 20}, 3)
        [guest] = set(last[1].members) - {1, 2}
        assert last[1].members == (1, 2, guest) and last[guest] == last[2] == last[1]
        assert [last[rank].members for rank in {3, 4} - {guest}] == [()]


def test_those_who_are_too_many_become_spare_ranks(monkeypatch):
    for seed in range(20):
        last = simulate(monkeypatch, seed, 4, 0, {1: 20}, 2)
        assert last == dict.fromkeys((0, 2, 3), View(2, (0, 2), b"103"))


def founding(network, hosts, spares):
    """Let hosts found groups of two spare ranks; gives the views that came of it, by rank."""
    views = {}

    def main(line):
        if line.rank in hosts:
            views[line.rank] = found(line, spares, 2, lambda ranks: Decision(tuple(ranks), b""))
            return
        while (new := as_spare(line, View(1, ()))) is None:
            pass
        views[line.rank] = new

    network.run(main)
    return views


def test_two_hosts_do_not_get_the_same_guest(monkeypatch):
    for seed in range(50):
        network = Network(5, seed, {})
        monkeypatch.setattr(regroup_module, "time", network)
        views = founding(network, [0, 1], [2, 3, 4])
        groups = [views.pop(host) for host in (0, 1)]
        guests = [rank for view in groups if view for rank in view.members]
        assert sorted(set(guests)) == sorted(guests) == sorted(views) and len(guests) >= 2
        assert all(views[rank] == view for view in groups if view for rank in view.members)


def test_nobody_is_founded_of_the_dead(monkeypatch):
    network = Network(3, 5, {1: 1, 2: 1})
    monkeypatch.setattr(regroup_module, "time", network)
    assert founding(network, [0], [1, 2]) == {0: None}


@pytest.mark.parametrize("view", [View(1, ()), View(7, (3, 1), b'{"a": 1}\n\x00'), View(2**40, (0,), b"")])
def test_views_survive_encoding(view):
    assert View.from_bytes(view.to_bytes()) == view


# For real.


def run_dying(ranks, *arguments):
    """What each rank that is left prints."""
    argv = [sys.executable, str(Path(__file__).with_name("dying_ranks.py")), *arguments]
    run = start_mpi(ranks, argv, flags=fault_tolerance()).wait(60)
    assert run.rc == 0, run.stderr
    return {found["rank"]: found for found in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize(
    ("ranks", "arguments", "members"),
    [
        (3, ["0", "0:20"], [1, 2]),
        (4, ["1", "1:0"], [0, 2, 3]),
        (5, ["1", "0:20", "1:-1", "3:40"], [2, 4]),  # 1 dies while it coordinates
        (4, ["1", "0:10", "1:10"], [2, 3]),
    ],
)
def test_a_group_of_processes_goes_on_without_its_dead(ranks, arguments, members):
    left = run_dying(ranks, *arguments)
    assert sorted(left) == sorted(members)
    for found_rank in left.values():
        assert found_rank["step"] >= 59 and found_rank["left"] == len(members)
        assert set(found_rank["members"]) <= set(left)
