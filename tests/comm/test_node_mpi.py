"""Channels between processes, and what happens when one of them is killed."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import fault_tolerance, start_mpi
from node_ranks import Sum

from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.library import load
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.world import start_world

needs_library = pytest.mark.skipif(load() is None, reason="the node library was not built")


@pytest.fixture(scope="module", params=["world", "tolerant"])
def group(request):
    world = start_world()
    return world if request.param == "world" else TolerantGroup(world.duplicate(), range(world.size)[::-1], epoch=1)


@needs_library
@pytest.mark.mpi(min_size=2)
def test_processes_sum_to_the_same_bits_round_after_round(group):
    channel = NodeChannel.open(group, range(group.size), 1 << 20)
    delays = np.random.default_rng(group.rank)
    cases = {count: Sum(group.size, count) for count in (1, 1024, 30_000, 500_000)}
    for step in range(150):
        count = [1, 1024, 30_000, 500_000][step % 37 % 4]
        case, out = cases[count], np.empty(count, "f4")
        nodes = case.nodes[channel.rank]
        room = channel.room((len(nodes), count)) if step % 3 else None
        if room is not None:
            room[:] = nodes
            nodes = list(room)
        if delays.random() < 0.2:
            time.sleep(delays.random() * 0.002)
        channel.all_reduce(case.program, nodes, out, form=["one_shot", "two_shot"][step % 2])
        assert out.tobytes() == case.total.tobytes(), f"{step = }"


@needs_library
@pytest.mark.mpi(min_size=2)
def test_stages_that_send_each_other_much_at_once_do_not_hang(group):
    channel = NodeChannel.open(group, range(group.size))
    ahead, behind = (channel.rank + 1) % channel.size, (channel.rank - 1) % channel.size
    for step in range(5):
        received = np.empty(1_500_000, "f4")
        sent = channel.send(np.full(1_500_000, 10 * step + channel.rank, "f4"), ahead, 11)
        channel.receive(received, behind, 11)
        channel.barrier()
        sent.wait()
        assert (received == 10 * step + behind).all()


@needs_library
@pytest.mark.parametrize("operation", ["one_shot", "two_shot", "all_gather", "broadcast", "all_to_all", "send"])
def test_survivors_of_a_killed_rank_go_on_in_a_channel_of_their_own(operation):
    argv = [sys.executable, str(Path(__file__).with_name("node_dying_ranks.py")), operation, "1:10", "2:25"]
    run = start_mpi(4, argv, flags=fault_tolerance()).wait(60)
    left = {found["rank"]: found for found in map(json.loads, run.stdout.splitlines())}
    assert sorted(left) == [0, 3], run.stderr
    for found in left.values():
        assert (found["members"], found["step"], found["files"]) == ([0, 3], 40, [])
        assert max(found["waited"]) < 5
