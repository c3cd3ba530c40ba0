"""A program for mpiexec with fault tolerance: ranks work in a channel of their node while one of them kills itself.

usage: node_dying_ranks.py OPERATION VICTIM:STEP …
OPERATION is that of the channel in which the others wait for the victim; with @ and the node of each rank it is one of
`Operations`, over made-up nodes, through memory as far as there is some.
Prints, on each rank that is left at the end: rank, its members, the steps it did, seconds until it saw a death, and
the files that are left of regions of these processes.
"""

import os
import sys

import numpy as np
from lives import STEPS, Lives, leave

from hpcinfer.comm.mpi import world_group
from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.node.region import FOLDER
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.selector import OPERATIONS, Point, Selector, shape_of
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.topology import Location
from hpcinfer.partition.tree_program import tree_program

COUNT = 300_001
line = world_group()
operation, _, nodes = sys.argv[1].partition("@")
line.locations = tuple(Location((), int(node), 0) for node in nodes) or None
lives = Lives(line, sys.argv[2:])


def exchange(channel, step):
    """Send much to the next rank and receive from the one before."""
    mine, theirs = np.full(COUNT, step, np.float32), np.empty(COUNT, np.float32)
    sent = channel.send(mine, (channel.rank + 1) % channel.size, 7)
    channel.receive(theirs, (channel.rank - 1) % channel.size, 7)
    sent.wait()
    return theirs


def do(channel, step):
    """One collective over ones; gives what must be all `step`."""
    size, out = channel.size, np.empty(COUNT, np.float32)
    ones = np.full(COUNT, step, np.float32)
    if operation in ("one_shot", "two_shot"):
        nodes = [subtrees(run) for run in grain_runs(8, size)]
        mine = [ones * (span.stop - span.start) / 8 for span in nodes[channel.rank]]
        channel.all_reduce(tree_program(nodes), mine, out, form=operation)
    elif operation == "all_gather":
        out = np.empty(size * COUNT, np.float32)
        channel.all_gather(ones, out, [COUNT] * size)
    elif operation == "broadcast":
        out = ones if channel.rank == 0 else out
        channel.broadcast(out, 0)
        channel.barrier()
    elif operation == "all_to_all":
        out = np.empty(size * 1000, np.float32)
        channel.all_to_all(ones[: size * 1000], out, [[1000] * size] * size)
    else:
        out = exchange(channel, step)
    return out


def do_on_nodes(operations, step):
    """The same, with operations that choose their way."""
    size, rank = operations.size, operations.rank
    ones, out = np.full(1000, step, np.float32), np.empty(1000 * size, np.float32)
    if operation == "all_gather":
        operations.all_gather(ones, out, [1000] * size)
    elif operation == "gather":
        operations.gather(ones, out if rank == 0 else None, [1000] * size)
        operations.broadcast(out, 0)
    elif operation == "broadcast":
        out[:] = step
        operations.broadcast(out, step % size)
    elif operation == "reduce_scatter":
        spans, out = [subtrees(run) for run in grain_runs(8, size)], out[:1000]
        mine = [np.full(len(ones) * size, step * (span.stop - span.start) / 8, np.float32) for span in spans[rank]]
        operations.reduce_scatter(tree_program(spans), mine, out, range(0, 1000 * size + 1, 1000))
    elif operation == "all_to_all":
        operations.all_to_all(np.full(1000 * size, step, np.float32), out, [[1000] * size] * size)
    else:
        sent = operations.send_bytes(ones.tobytes(), (rank + 1) % size, 7)
        out = np.frombuffer(operations.receive_bytes((rank - 1) % size, 7), np.float32)
        sent.wait()
    return out


def open_on_nodes(group):
    """Operations of a group on made-up nodes."""
    only = {name: {"node": [Point(1, 1.0)], "mpi": [Point(1, 2.0)]} for name in OPERATIONS}
    selector = Selector(table={shape_of(group.locations, group.size): only})
    return Operations(group, open_channel(group), selector)


def work(view, step):
    """Go on until the end, or until somebody dies."""
    group = TolerantGroup(line, view.members, view.epoch)
    if nodes:
        channel, act = open_on_nodes(group), do_on_nodes
    else:
        channel, act = NodeChannel.open(group, range(group.size), slot_bytes=1 << 16), do
    assert channel is not None
    while step < STEPS:
        lives.begin(step)
        assert (act(channel, step) == step).all(), f"{line.rank = } {step = }"
        step += 1
        yield step
    group.barrier()


pids = [data.decode() for data in line.all_gather_bytes(b"%d" % os.getpid())]
result = lives.live(work)
files = [name for name in os.listdir(FOLDER) if name.startswith("hpcinfer-") and name.split("-")[2] in pids]
leave({**result, "files": files})
