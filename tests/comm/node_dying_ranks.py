"""A program for mpiexec with fault tolerance: ranks work in a channel of their node while one of them kills itself.

usage: node_dying_ranks.py OPERATION VICTIM:STEP …
OPERATION is that of the channel in which the others wait for the victim.
Prints, on each rank that is left at the end: rank, its members, the steps it did, seconds until it saw a death, and
the files of regions that are left.
"""

import json
import os
import signal
import sys
import time

import numpy as np

from hpcinfer.comm.mpi import world_group
from hpcinfer.comm.node.channel import FOLDER, NodeChannel
from hpcinfer.comm.regroup import Decision, View, regroup
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.tree_program import tree_program

STEPS, COUNT = 40, 300_001
line = world_group()
operation = sys.argv[1]
victims = dict(map(int, pair.split(":")) for pair in sys.argv[2:])


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


def work(view, step):
    """Go on until the end, or until somebody dies."""
    group = TolerantGroup(line, view.members, view.epoch)
    channel = NodeChannel.open(group, range(group.size), slot_bytes=1 << 16)
    assert channel is not None
    while step < STEPS:
        if victims.get(line.rank) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        assert (do(channel, step) == step).all(), f"{line.rank = } {step = }"
        step += 1
        yield step
    channel.barrier()


def main():
    view, step, waited = View(1, tuple(range(line.size))), 0, []
    while step < STEPS:
        start = time.monotonic()
        try:
            for done in work(view, step):
                step, start = done, time.monotonic()
        except RankFailedError:
            waited.append(time.monotonic() - start)
            offer = json.dumps({"step": step}).encode()
            view = regroup(line, view, offer, lambda offers, guests: Decision(
                tuple(offers), str(max(json.loads(each)["step"] for each in offers.values() if each)).encode()))
            step = int(view.plan)
    ours = [name for name in os.listdir(FOLDER) if name.startswith("hpcinfer-")]
    print(json.dumps({"rank": line.rank, "members": view.members, "step": step, "waited": waited, "files": ours}),
          flush=True)
    os._exit(0)


main()
