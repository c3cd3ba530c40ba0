"""Operations between threads and between processes: what is moved is the same, whatever way it takes."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import fault_tolerance, start_mpi
from node_ranks import Sum
from thread_group import run_ranks

from hpcinfer.comm.node.library import load
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.selector import MESSAGES, NODE, OPERATIONS, Point, Selector, shape_of
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.world import start_world
from hpcinfer.partition.topology import Location

NODES = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 1), (0, 1, 2, 3)]
needs_library = pytest.mark.skipif(load() is None, reason="the node library was not built")


def located(nodes):
    return tuple(Location((), node, 0) for node in nodes)


def operations_on(group, way):
    """All through one way, where a group can have it."""
    only = {name: {each: [Point(1, 1.0 if each == way else 2.0)] for each in (NODE, MESSAGES)} for name in OPERATIONS}
    return Operations(group, open_channel(group), Selector(table={shape_of(group.locations, group.size): only}))


def check_all(operations, count):
    """Do everything once; raises where something is not what it must be."""
    rank, size = operations.rank, operations.size
    counts = [count * (peer % 3) + peer for peer in range(size)]
    expected = np.repeat(np.arange(size), counts).tolist()
    mine, gathered = np.full(counts[rank], rank, "f4"), np.empty(sum(counts), "f4")
    operations.all_gather(mine, gathered, counts)
    assert gathered.tolist() == expected
    for root in range(size):
        on_root = np.empty(sum(counts), "f4") if rank == root else None
        operations.gather(mine, on_root, counts, root)
        assert on_root is None or on_root.tolist() == expected
        told = np.full(count, root if rank == root else -1, "f4")
        operations.broadcast(told, root)
        assert (told == root).all()
    table = [[(7 * i + 3 * j) % 5 * count for j in range(size)] for i in range(size)]
    sent = np.repeat(np.arange(size) + 10.0 * rank, table[rank]).astype("f4")
    exchanged = np.empty(sum(row[rank] for row in table), "f4")
    operations.all_to_all(sent, exchanged, table)
    assert exchanged.tolist() == np.repeat(10 * np.arange(size) + rank, [row[rank] for row in table]).tolist()
    case, bounds = Sum(size, count), [min(count, 40 * peer) for peer in range(size)] + [count]
    part = np.empty(bounds[rank + 1] - bounds[rank], "f4")
    operations.reduce_scatter(case.program, case.nodes[rank], part, bounds)
    assert part.tobytes() == case.total[bounds[rank] : bounds[rank + 1]].tobytes()
    check_messages(operations, count)


def check_messages(operations, count):
    """Bytes and arrays to all others, of a size that memory takes at once and of one that it does not."""
    rank, size, ring_bytes = operations.rank, operations.size, 1 << 20
    for length in (0, count, ring_bytes):
        peers = [(rank + step) % size for step in range(1, size)]
        sent = [operations.send_bytes(b"%d" % rank + bytes(length), peer, 5) for peer in peers]
        assert all(operations.receive_bytes(peer, 5) == b"%d" % peer + bytes(length) for peer in reversed(peers))
        sent += [operations.send(np.full(length, rank, "f4"), peer, 6) for peer in peers]
        for peer in peers:
            received = np.empty(length, "f4")
            operations.receive(received, peer, 6)
            assert (received == peer).all()
        for each in sent:
            each.wait()


@needs_library
@pytest.mark.parametrize("way", [NODE, MESSAGES])
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_every_operation_gives_the_same_both_ways(nodes, way):
    def work(group):
        group.locations = located(nodes)
        operations = operations_on(group, way)
        for count in (0, 1, 1000):
            check_all(operations, count)

    assert run_ranks(4, work) == [None] * 4


def test_without_shared_memory_everything_is_a_message():
    assert run_ranks(3, lambda group: check_all(Operations(group), 100)) == [None] * 3
    check_all(Operations(SerialGroup()), 100)


@needs_library
def test_memory_leaves_nothing_to_send_inside_a_node_and_little_between_nodes():
    """Both nodes of two ranks exchange what each has, once in each direction."""

    def work(group):
        group.locations, sent = located((0, 0, 1, 1)), []
        operations, send = operations_on(group, NODE), group.send

        def count(buffer, peer, tag=0):
            sent.append((peer, np.asarray(buffer).size))
            return send(buffer, peer, tag)

        group.send = count
        operations.all_gather(np.zeros(50, "f4"), np.empty(200, "f4"), [50] * 4)
        operations.broadcast(np.zeros(70, "f4"), 1)
        operations.send(np.zeros(10, "f4"), group.rank ^ 1)
        operations.receive(np.empty(10, "f4"), group.rank ^ 1)
        return sent

    assert run_ranks(4, work) == [[(2, 100)], [(2, 70)], [(0, 100)], []]


@needs_library
def test_who_waits_long_for_bytes_is_idle():
    def work(group):
        group.locations, idle = located((0, 0)), []
        group.while_idle = lambda: idle.append(1)
        operations = operations_on(group, NODE)
        if group.rank == 1:
            while not idle_of[0]:
                time.sleep(0.001)
            operations.send_bytes(b"now", 0)
            return None
        idle_of[0] = idle
        data = operations.receive_bytes(1)
        return data, len(idle) > 0, operations.channel.while_waiting

    idle_of = [[]]
    assert run_ranks(2, work)[0] == (b"now", True, None)


@pytest.fixture(scope="module")
def world():
    return start_world()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", ["world", "tolerant"])
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_processes_get_the_same_both_ways(world, kind, nodes):
    line = world.duplicate()
    line.locations = located(nodes[: line.size])
    group = line if kind == "world" else TolerantGroup(line, range(line.size)[::-1], epoch=1)
    for way in (NODE, MESSAGES):
        operations = operations_on(group, way)
        for count in (1, 1000, 100_000):
            check_all(operations, count)


@needs_library
@pytest.mark.parametrize("nodes", ["0000", "0011"])
@pytest.mark.parametrize("operation", ["all_gather", "gather", "broadcast", "reduce_scatter", "all_to_all", "bytes"])
def test_a_death_is_seen_by_all_who_wait_and_they_go_on_without_the_dead(operation, nodes):
    program = str(Path(__file__).with_name("node_dying_ranks.py"))
    argv = [sys.executable, program, f"{operation}@{nodes}", "1:10", "2:25"]
    run = start_mpi(4, argv, flags=fault_tolerance()).wait(60)
    left = {found["rank"]: found for found in map(json.loads, run.stdout.splitlines())}
    assert sorted(left) == [0, 3], run.stderr
    for found in left.values():
        assert (found["members"], found["step"], found["files"]) == ([0, 3], 40, [])
        assert max(found["waited"]) < 5
