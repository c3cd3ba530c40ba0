import pytest

from hpcinfer.comm.topology import Survey
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING
from hpcinfer.diagnosis.placement import check_placement
from hpcinfer.partition.topology import Location


def surveyed(*counts, switches=(), sockets=1):
    """So many ranks on each node, in order; the switch of each node."""
    nodes = [node for node, count in enumerate(counts) for _ in range(count)]
    locations = tuple(Location((switches[node],) if switches else (), node, each % sockets)
                      for each, node in enumerate(nodes))  # fmt: skip
    names = tuple(f"leaf{number}" for number in sorted(set(switches)))
    return Survey(locations, tuple(f"node{node}" for node in nodes), names)


def test_a_rank_alone_has_no_placement():
    assert check_placement(surveyed(1), 1, 1) == []


def test_nodes_are_counted():
    (finding,) = check_placement(surveyed(3, 5), 1, 1)
    assert finding.level == OK and finding.found == "8 ranks on 2 nodes, 3,5 on each, switches unknown"
    (finding,) = check_placement(surveyed(4, sockets=2), 1, 1)
    assert finding.found == "4 ranks on 1 node, on 2 sockets"
    (finding,) = check_placement(surveyed(2, 2, switches=(0, 1)), 1, 1)
    assert finding.found.endswith("below 2 switches")


def test_tp_inside_nodes_is_fine():
    nodes, mesh = check_placement(surveyed(4, 4), 4, 1)
    assert nodes.level == mesh.level == OK
    assert mesh.found == "dp=2 pp=1 tp=4: replicas 0 on node0; 1 on node1; tp groups: all 2 inside a node"


@pytest.mark.parametrize(("counts", "tp", "pp", "crossing", "hint"), [
    ((4, 4, 4), 3, 1, "1 of 4", "tp=3 does not divide the 4 ranks of a node; tp=2 or 4 keeps it inside"),
    ((4, 4), 8, 1, "1 of 1", "tp=8 does not divide the 4 ranks of a node; tp=4 keeps it inside"),
    ((4, 8), 6, 2, "1 of 2", "tp=6 does not divide 4,8 ranks of a node; tp=4 keeps it inside"),
    ((3, 5), 2, 2, "1 of 4", "as many ranks on each node"),
])  # fmt: skip
def test_tp_that_crosses_nodes_says_how_to_keep_it_inside(counts, tp, pp, crossing, hint):
    *_, finding = check_placement(surveyed(*counts), tp, pp)
    assert finding.level == WARNING and finding.hint.startswith(hint)
    assert finding.found.startswith(f"{crossing} tp groups cross nodes: ")


def test_switches_that_are_crossed_are_counted():
    *_, finding = check_placement(surveyed(1, 1, 1, 1, 1, 1, switches=(0, 0, 0, 1, 1, 1)), 2, 1)
    assert finding.found.startswith("3 of 3 tp groups cross nodes, 1 of them switches too") and len(finding.ranks) == 6


def test_ranks_out_of_order_are_explained():
    _, mesh, _ = check_placement(surveyed(1, 2, 1), 2, 1)
    assert mesh.found.endswith("ranks are taken out of order, to keep tp inside nodes and switches")


def test_a_mesh_that_does_not_fit_is_an_error():
    *_, finding = check_placement(surveyed(3, 5), 3, 1)
    assert finding.level == ERROR and "world size (8)" in finding.found and finding.hint
