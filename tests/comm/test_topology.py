"""Where ranks run, as they say themselves and as Slurm says; and the words for it."""

import json
import os
import stat

import pytest

from hpcinfer.comm import topology as module
from hpcinfer.comm.seating import describe_seats, seats
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.topology import (
    Survey,
    discover,
    expand_hosts,
    machine_id,
    parse_topology,
    survey,
)
from hpcinfer.partition.layout import ModelLimits, layout_of
from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.topology import Location

TREE = """\
SwitchName=s0 Level=0 LinkSpeed=1 Nodes=tux[0-3]
SwitchName=s1 Level=0 LinkSpeed=1 Nodes=tux[4-7]
SwitchName=s2 Level=1 LinkSpeed=1 Nodes=tux[0-7] Switches=s[0-1]
"""
BLOCKS = """\
BlockName=b0 BlockIndex=0 Nodes=gb[01-02] BlockSize=2
BlockName=b1 BlockIndex=1 Nodes=gb[03-04] BlockSize=2
AggregatedBlock=b[0-1] BlockIndex=2 Nodes=gb[01-04] BlockSize=4
"""
SPINE = {"SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}


class Ranks:
    """A group whose ranks have been heard; this one is the root."""

    rank = 0

    def __init__(self, *own):
        self.own, self.size, self.asked = own, len(own), 0

    def all_gather_bytes(self, data):
        return [json.dumps(own).encode() for own in self.own]

    def broadcast_bytes(self, data, root=0):
        self.asked += 1
        return data


def rank(host, environment=(), *, memory=None, socket=0, can_ask=False):
    look = module._look(dict(environment))
    return look._replace(host=host, memory=memory or host, socket=socket, can_ask=can_ask)


def test_expanded_hosts_are_as_slurm_counts_them():
    assert expand_hosts("n[0-2,07],login") == ["n0", "n1", "n2", "n07", "login"]
    assert expand_hosts("r[1-2]c[08-09]-ib") == ["r1c08-ib", "r1c09-ib", "r2c08-ib", "r2c09-ib"]
    assert expand_hosts("10.0.0.1,10.0.0.2") == ["10.0.0.1", "10.0.0.2"] and expand_hosts("") == []


def test_switches_of_a_node_begin_with_the_outermost():
    known = parse_topology(TREE)
    assert known["tux0"] == ["s2", "s0"] and known["tux7"] == ["s2", "s1"] and len(known) == 8
    assert parse_topology(BLOCKS)["gb03"] == ["b[0-1]", "b1"]
    assert parse_topology("No topology information available\nSwitchName=x Level=? Nodes=n[]") == {}
    assert parse_topology("SwitchName=b Level=0 Nodes=n0\nSwitchName=a Level=0 Nodes=n0") == {"n0": ["a"]}


def test_nodes_are_those_that_share_memory_whatever_their_names():
    ranks = [rank("a", memory="one"), rank("b", memory="one"), rank("a", memory="two", socket=1)]
    found = survey(Ranks(*ranks))
    assert found.locations == (Location((), 0, 0), Location((), 0, 0), Location((), 1, 1))
    assert found.hosts == ("a", "b", "a") and found.num_nodes == 2 and found.switches == ()


def test_switches_come_from_slurms_variables():
    names = {"n0": "core.leaf0", "n1": "core.leaf1", "n2": "core.leaf0"}
    ranks = [rank(host, {**SPINE, "SLURM_TOPOLOGY_ADDR": f"{above}.{host}"}) for host, above in names.items()]
    found = survey(Ranks(*ranks))
    assert [location.switches for location in found.locations] == [(0, 1), (0, 2), (0, 1)]
    assert found.above(1) == ["core", "leaf1"]


@pytest.mark.parametrize("address", ["core.leaf0.n0", ""])
def test_variables_that_a_launcher_has_copied_are_not_believed(monkeypatch, address):
    monkeypatch.setattr(module, "_ask_slurm", lambda: TREE)
    ranks = [rank(host, {**SPINE, "SLURM_TOPOLOGY_ADDR": address}, can_ask=True) for host in ("tux1.site", "tux5.site")]
    group = Ranks(*ranks)
    found = survey(group)
    assert [found.above(each) for each in (0, 1)] == [["s2", "s0"], ["s2", "s1"]] and group.asked == 1


def test_slurm_is_asked_only_where_it_helps(monkeypatch):
    monkeypatch.setattr(module, "_ask_slurm", lambda: pytest.fail("asked"))
    for ranks in ([rank("a", can_ask=True)] * 2, [rank("a"), rank("b", can_ask=True)]):
        group = Ranks(*ranks)
        assert survey(group).switches == () and group.asked == 0


def test_a_node_that_no_switch_is_known_of_makes_all_unknown(monkeypatch):
    monkeypatch.setattr(module, "_ask_slurm", lambda: TREE)
    found = survey(Ranks(*[rank(host, can_ask=True) for host in ("tux1", "tux5", "elsewhere")]))
    assert {location.switches for location in found.locations} == {()}


def test_nodes_on_switches_of_several_levels_have_as_many_each(monkeypatch):
    monkeypatch.setattr(module, "_ask_slurm", lambda: TREE + "SwitchName=s3 Level=2 Nodes=tux[0-9] Switches=s2\n")
    found = survey(Ranks(*[rank(host, can_ask=True) for host in ("tux1", "tux9")]))
    assert found.above(0) == ["s3", "s2", "s0"] and found.above(1) == ["s3"] * 3


@pytest.mark.parametrize("script", ["exec sleep 9", "exit 1", "echo nonsense", "printf '\\377\\n'"])
def test_a_slurm_that_does_not_answer_changes_nothing(monkeypatch, tmp_path, script):
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "_SCONTROL_S", 0.2)
    assert module._look({"SLURM_JOB_ID": "1"}).can_ask
    found = survey(Ranks(rank("a", can_ask=True), rank("b", can_ask=True)))
    assert found.switches == () and found.num_nodes == 2


def test_a_socket_is_the_one_that_has_all_cpus_of_the_process(monkeypatch, tmp_path):
    for node, cpus in enumerate(("0-3,8-11\n", "4-7,12-15\n", "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    for own, expected in (({1, 9}, 0), ({4}, 1), ({3, 4}, 0), ({16}, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, own=own: own)
        assert module._own_socket(tmp_path) == expected
    assert module._own_socket(tmp_path / "nothing") == 0


def test_a_process_alone_is_on_one_node():
    assert discover(SerialGroup())[0]._replace(socket=0) == Location((), 0, 0)
    assert machine_id() == machine_id() != ""


@pytest.mark.mpi(min_size=2)
def test_ranks_of_one_host_are_on_one_node_on_every_rank():
    from hpcinfer.comm.mpi import world_group

    world = world_group()
    found = discover(world)
    assert {location.node for location in found} == {0} and len(found) == world.size
    assert set(world.all_gather_bytes(repr(found).encode())) == {repr(found).encode()}
    world.locations = found
    assert world.split(world.rank % 2, -world.rank).locations == tuple(found[world.rank % 2 :: 2][::-1])


def uneven():
    """Three ranks on one host, five on another."""
    return Survey(tuple(Location((), int(each > 2), 0) for each in range(8)), ("a",) * 3 + ("b",) * 5)


def test_places_are_said_in_a_line():
    layout = layout_of(Mesh(3, 1, 2), [0, 1, 3, 4, 5, 6, 2, 7], ModelLimits(4, 8))
    text = describe_seats(layout, uneven())
    assert text == "replicas 0 on a; 1 on b; 2 on b; tp groups: all 3 inside a node; spare on a+b"
    crossing = describe_seats(layout_of(Mesh(1, 2, 4), range(8), ModelLimits(4, 8)), uneven())
    assert crossing == "replica 0 on b+a; tp groups: 1 inside a node, 1 across nodes; replicas: 1 across nodes"


def test_places_are_data_for_every_rank():
    places = seats(layout_of(Mesh(1, 2, 2), [3, 4, 0, 1, 2, 5, 6, 7], ModelLimits(4, 8)), uneven())
    assert places[1] == {"rank": 1, "host": "a", "node": 0, "socket": 0, "switches": [], "dp": 0, "pp": 1, "tp": 1}
    assert [place["rank"] for place in places if place["dp"] is None] == [2, 5, 6, 7]
    assert json.loads(json.dumps(places)) == places


def test_nodes_of_one_host_name_are_told_apart():
    here = Survey((Location((), 0, 0), Location((), 1, 0), Location((), 2, 0)), ("a", "a", "b"))
    assert [here.name_of(node) for node in range(3)] == ["a#0", "a#1", "b"]
