import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.diagnosis.links import measure_links, num_rounds, opponent


@given(st.integers(1, 40))
def test_everyone_meets_everyone_once_and_nobody_twice_at_a_time(count):
    members = [3 * i + 1 for i in range(count)]  # ranks need not be 0, 1, 2...
    met = []
    for number in range(num_rounds(count)):
        peers = {rank: opponent(rank, number, members) for rank in members}
        assert all(peer is None or peers[peer] == rank != peer for rank, peer in peers.items())
        assert sum(peer is None for peer in peers.values()) == count % 2
        met += [(rank, peer) for rank, peer in peers.items() if peer is not None and rank < peer]
    assert sorted(met) == list(itertools.combinations(members, 2))


def test_who_takes_no_part_and_who_is_done_meets_nobody():
    assert opponent(5, 0, [0, 1, 2]) is None and opponent(0, 1, [0, 1]) is None and opponent(0, 0, [0]) is None


@pytest.mark.mpi(min_size=2)
def test_all_pairs_of_a_small_world_are_measured():
    from hpcinfer.comm.mpi import world_group

    world = world_group()
    links = measure_links(world, [list(range(world.size))], 10.0)
    pairs = list(itertools.combinations(range(world.size), 2)) if world.rank == 0 else []
    assert sorted((link.a, link.b) for link in links) == pairs
    assert all(0 < link.latency_s < 1 and link.bytes_per_s > 1e5 for link in links)


@pytest.mark.mpi(min_size=4)
def test_pairs_between_nodes_follow_those_within():
    from hpcinfer.comm.mpi import world_group

    world = world_group()
    links = measure_links(world, [[0, 2], [1, 3]], 10.0)
    if world.rank == 0:
        assert sorted((link.a, link.b) for link in links[:]) == list(itertools.combinations(range(4), 2))


@pytest.mark.mpi(min_size=2)
def test_without_time_nothing_is_measured_and_nobody_waits():
    from hpcinfer.comm.mpi import world_group

    world = world_group()
    assert measure_links(world, [[rank] for rank in range(world.size)], -1.0) == []
