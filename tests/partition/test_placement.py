import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.placement import _cost, num_whole_replicas, place_ranks
from hpcinfer.partition.topology import ALL, NODE, SWITCH, Location, by_node, by_switch, level_of, numbered


def located(nodes, switches=None, sockets=None):
    """Locations by the node of each rank, the switch of each node, the socket of each rank."""
    return [Location((switches[node],) if switches else (), node, sockets[rank] if sockets else 0)
            for rank, node in enumerate(numbered(nodes))]  # fmt: skip


def crossing(mesh, order, locations):
    """Tp groups that cross nodes, and those that cross switches."""
    placed = order[: num_whole_replicas(mesh, len(order)) * mesh.replica_size]
    groups = [placed[start : start + mesh.tp] for start in range(0, len(placed), mesh.tp)]
    levels = [level_of([locations[rank] for rank in group]) for group in groups]
    return len(levels) - levels.count(NODE), levels.count(ALL)


def best(mesh, locations):
    """What no order is better than."""
    return min(crossing(mesh, order, locations) for order in itertools.permutations(range(len(locations))))


SIZES = st.integers(1, 4)
NODES = st.lists(st.integers(0, 5), min_size=1, max_size=40)
SWITCHES = st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=6, max_size=6))
SOCKETS = st.lists(st.integers(0, 1), min_size=40, max_size=40)


@given(NODES, SWITCHES, SOCKETS, SIZES, SIZES, SIZES)
def test_every_rank_is_placed_once_and_never_worse_than_in_order(nodes, switches, sockets, dp, pp, tp):
    mesh, locations = Mesh(dp, pp, tp), located(nodes, switches, sockets)
    order = place_ranks(mesh, locations)
    assert sorted(order) == list(range(len(nodes))) and order == place_ranks(mesh, list(locations))
    paths, plain = [location.path for location in locations], tuple(range(len(nodes)))
    assert crossing(mesh, order, locations) <= crossing(mesh, plain, locations)
    assert order == plain or _cost(mesh, order, paths) < _cost(mesh, plain, paths)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), SWITCHES, st.integers(1, 3), st.integers(2, 3))
def test_no_order_has_more_tp_groups_inside_nodes_then_switches(nodes, switches, pp, tp):
    mesh = Mesh(max(1, len(nodes) // (pp * tp)), pp, tp)
    locations = located(nodes, switches)
    assert crossing(mesh, place_ranks(mesh, locations), locations) == best(mesh, locations)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_what_is_in_order_stays_in_order(num_nodes, per_node, pp, tp):
    locations = located([rank // (per_node * pp * tp) for rank in range(num_nodes * per_node * pp * tp)])
    assert place_ranks(Mesh(num_nodes * per_node, pp, tp), locations) == tuple(range(len(locations)))


def test_one_node_stays_as_it_is():
    locations = located([0] * 4, sockets=[0, 1, 0, 1])
    assert place_ranks(Mesh(2, 1, 2), locations) == (0, 1, 2, 3)


def test_three_ranks_on_one_node_and_five_on_another():
    locations = located([0] * 3 + [1] * 5)
    assert crossing(Mesh(4, 1, 2), range(8), locations) == (1, 1)
    order = place_ranks(Mesh(2, 2, 2), locations)
    assert crossing(Mesh(2, 2, 2), order, locations) == (1, 1)
    assert place_ranks(Mesh(1, 1, 5), locations)[:5] == (3, 4, 5, 6, 7)
    assert place_ranks(Mesh(1, 1, 2), located([0] + [1] * 2)) == (1, 2, 0)


def test_ranks_that_were_dealt_round_the_nodes_are_gathered():
    locations = located([0, 1] * 4)
    assert place_ranks(Mesh(2, 1, 4), locations) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert place_ranks(Mesh(1, 2, 4), locations) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert place_ranks(Mesh(2, 2, 2), locations) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert place_ranks(Mesh(1, 1, 8), locations) == (0, 2, 4, 6, 1, 3, 5, 7)  # neighbours of the tree on one node


def test_groups_that_no_node_holds_stay_below_a_switch():
    locations = located([0, 1, 2, 3], switches=[0, 1, 0, 1])
    assert place_ranks(Mesh(2, 1, 2), locations) == (0, 2, 1, 3)


def test_replicas_are_together_where_spare_ranks_leave_a_choice():
    order = place_ranks(Mesh(2, 2, 2), located([0] * 6 + [1] * 6))
    assert order[:8] == (0, 1, 2, 3, 6, 7, 8, 9) and sorted(order[8:]) == [4, 5, 10, 11]


@pytest.mark.parametrize("mesh", [Mesh(512, 2, 4), Mesh(1, 4096, 1), Mesh(256, 1, 16)], ids=str)
def test_thousands_of_ranks_are_placed_at_once(mesh):
    start = time.perf_counter()
    order = place_ranks(mesh, located([rank // 3 for rank in range(4096)]))
    assert sorted(order) == list(range(4096)) and time.perf_counter() - start < 1.0


def test_tp_stays_on_a_socket_where_nodes_allow_it():
    locations = located([0] * 4 + [1] * 4, sockets=[0, 1, 0, 1] * 2)
    assert place_ranks(Mesh(4, 1, 2), locations) == (0, 2, 1, 3, 4, 6, 5, 7)


@pytest.mark.parametrize(("ranks", "level"), [((0, 1), NODE), ((0, 2), SWITCH), ((0, 3), ALL), ((2, 2), NODE)])
def test_level_of_ranks(ranks, level):
    locations = located([0, 0, 1, 2], switches=[0, 0, 1])
    assert level_of([locations[rank] for rank in ranks]) == level


def test_nodes_below_no_known_switch_have_no_switch_level():
    assert level_of(located([0, 1])) == ALL and by_switch(located([0, 1])) == [(0, 1)]
    assert by_node(located([5, 3, 5])) == [(0, 2), (1,)]
