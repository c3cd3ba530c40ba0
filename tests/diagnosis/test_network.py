import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_ranks import cluster, levels

from hpcinfer.comm.library import MpiLibrary
from hpcinfer.comm.topology import Survey
from hpcinfer.diagnosis.devices import Devices
from hpcinfer.diagnosis.finding import OK, WARNING, fold
from hpcinfer.diagnosis.network import Link, blame, check_clocks, check_links, slow_links
from hpcinfer.partition.topology import Location, numbered

LATENCY_S, BYTES_PER_S = 2e-6, 12e9


def facts_of(nodes, **more):
    """One rank on each node."""
    return {fact.rank: replace(fact, **more) for fact in cluster(nodes, 1)}


def survey_of(facts):
    """16 nodes on a leaf switch, all leaves on a spine."""
    nodes = numbered([fact.host for fact in facts.values()])
    locations = tuple(Location((0, 1 + node // 16), node, 0) for node in nodes)
    names = ("spine", *(f"leaf{number}" for number in range(max(nodes) // 16 + 1)))
    return Survey(locations, tuple(fact.host for fact in facts.values()), names)


def links_of(ranks, slow=lambda a, b: False, seed=0):
    """All pairs, up to 30 % apart; the slow ones ten times slower."""
    dice = random.Random(seed)
    return [Link(a, b, LATENCY_S * dice.uniform(1, 1.3) * (10 + 20 * slow(a, b) if slow(a, b) else 1),
                 BYTES_PER_S / dice.uniform(1, 1.3) / (10 if slow(a, b) else 1))
            for a, b in itertools.combinations(ranks, 2)]  # fmt: skip


def warnings(links, facts, *, is_crowded=False):
    found = check_links(links, facts, survey_of(facts), is_crowded=is_crowded)
    return [finding for finding in found if finding.level == WARNING]


@given(st.integers(2, 12), st.integers())
def test_links_that_are_alike_are_not_blamed(count, seed):
    assert slow_links(links_of(range(count), seed=seed)) == []


def test_a_healthy_network_is_summed_up_in_a_line_for_each_level():
    facts = {fact.rank: fact for fact in cluster(32, 2)}
    found = check_links(links_of(range(64)), facts, survey_of(facts), is_crowded=False)
    assert levels(found) == [OK] * 3 and all("latency 2" in each.found and "GiB/s" in each.found for each in found)
    assert [each.found.split(",")[0] for each in found] == [
        "within nodes: 32 pairs", "between nodes of a switch: 960 pairs", "between switches: 1024 pairs",
    ]  # fmt: skip


def test_without_switches_nodes_are_the_outermost_level():
    facts = facts_of(8)
    nowhere = Survey(tuple(Location((), node, 0) for node in range(8)), ("",) * 8)
    (finding,) = check_links(links_of(range(8)), facts, nowhere, is_crowded=False)
    assert "between nodes: 28 pairs" in finding.found


def test_a_slow_node_is_named_not_its_links():
    (finding,) = warnings(links_of(range(64), lambda a, b: 37 in (a, b)), facts_of(64))
    assert "slow links of node node037 (63)" in finding.found and finding.ranks == (37,)


def test_a_slow_switch_is_named_not_its_nodes():
    (finding,) = warnings(links_of(range(64), lambda a, b: 16 <= a < 32 or 16 <= b < 32), facts_of(64))
    assert "slow links of switch leaf1" in finding.found and finding.ranks == tuple(range(16, 32))


def test_a_single_slow_link_is_named_by_its_ranks():
    (finding,) = warnings(links_of(range(32), lambda a, b: (a, b) == (3, 17)), facts_of(32))
    assert "slow links between nodes (1), ranks 3-17" in finding.found


def test_a_slow_node_and_a_slow_link_are_told_apart():
    found = warnings(links_of(range(40), lambda a, b: 7 in (a, b) or (a, b) == (20, 30)), facts_of(40))
    assert ["node node007" in finding.found for finding in found] == [True, False] and "20-30" in found[1].found


def test_a_spine_that_all_share_is_never_to_blame():
    facts = facts_of(40)
    found = warnings(links_of(range(40), lambda a, b: random.Random(a * 99 + b).random() < 0.3), facts)
    assert not [finding for finding in found if "spine" in finding.found]


def test_thin_links_are_slow_though_their_latency_is_fine():
    links = [link._replace(bytes_per_s=1e9) if link.a == 0 else link for link in links_of(range(8))]
    assert {link.a for link in slow_links(links)} == {0}


def test_links_within_a_node_are_judged_apart_from_those_between_nodes():
    facts = {fact.rank: fact for fact in cluster(4, 4)}
    slow_between = links_of(range(16), lambda a, b: a // 4 != b // 4)
    assert warnings(slow_between, facts) == []
    (finding,) = warnings(links_of(range(16), lambda a, b: 5 in (a, b) and a // 4 == b // 4), facts)
    assert finding.ranks == (5,) and "slow links of rank 5 (3)" in finding.found


def test_nothing_is_judged_where_ranks_take_turns():
    links = links_of(range(8), lambda a, b: a == 0)
    assert warnings(links, facts_of(8), is_crowded=True) == []
    assert "take turns" in check_links(links, facts_of(8), survey_of(facts_of(8)), is_crowded=True)[0].found


def test_two_links_are_too_few_to_have_an_outlier():
    assert slow_links([Link(0, 1, 1e-6, 1e9), Link(0, 2, 1e-3, 1e6)]) == []


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] < pair[1])))
def test_every_slow_link_is_blamed_once(pairs):
    links = links_of(range(10))
    slow = [link for link in links if (link.a, link.b) in pairs]
    groups = blame(slow, links, lambda rank: [f"node {rank}", f"switch {rank // 4}"])
    assert sorted(link for group in groups.values() for link in group) == sorted(slow)


@pytest.mark.parametrize(("transport", "hint"), [("ob1", "without --with-ft"), ("ucx", "built for this fabric")])
def test_tcp_beside_a_fast_adapter_is_noticed(transport, hint):
    mpi = MpiLibrary("Open MPI 5.0.11", transport=transport)
    facts = facts_of(8, devices=Devices(fabrics=("mlx5_0",)), mpi=mpi)
    tcp = [link._replace(latency_s=5e-5) for link in links_of(range(8))]
    (finding,) = warnings(tcp, facts)
    assert "mlx5_0" in finding.found and hint in finding.hint
    assert warnings(links_of(range(8)), facts) == [] and warnings(tcp, facts_of(8)) == []


def test_clocks_that_are_apart_name_their_nodes():
    offsets = dict.fromkeys(range(8, 1000, 8), 0.001)
    assert levels(check_clocks(offsets)) == [OK] and check_clocks({}) == []
    findings = fold(check_clocks({**offsets, 80: 180.0, 96: -3.0}))
    assert levels(findings) == [WARNING, WARNING] and findings[0].ranks == (80,)
    assert "+3 min" in findings[0].found and "-3.0 s" in findings[1].found
