"""A program for mpiexec with fault tolerance: a group sums over made-up nodes while some members kill themselves.

usage: dying_forms.py FORM LENGTH VICTIM:STEP …
Prints, on each rank that is left at the end: rank, its members, the steps it did, seconds until it saw a death.
"""

import json
import os
import signal
import sys
import time

import numpy as np

from hpcinfer.comm.mpi import world_group
from hpcinfer.comm.regroup import Decision, View, regroup
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.topology import Location

STEPS = 40
line = world_group()
line.locations = tuple(Location((rank // 4,), rank // 2, 0) for rank in range(line.size))
form, length = sys.argv[1], int(sys.argv[2])
victims = dict(map(int, pair.split(":")) for pair in sys.argv[3:])


def work(view, step):
    """Sum ones, two sums at a time; every member must be in the same step."""
    group = TolerantGroup(line, view.members, view.epoch)
    reducer = TreeReducer(group, 8, lambda shape: np.empty(shape, np.float32), Selector(form))
    while step < STEPS:
        if victims.get(line.rank) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        nodes = [np.full(length, step * (stop - start) / 8, np.float32) for start, stop in reducer.spans]
        try:
            for total in [reducer.start(nodes), reducer.start(nodes)]:
                assert (reducer.finish(total) == step).all(), f"{line.rank = } {step = }"
        except RankFailedError:
            reducer.close()
            raise
        step += 1
        yield step
    group.barrier()


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
    print(json.dumps({"rank": line.rank, "members": view.members, "step": step, "waited": waited}), flush=True)
    os._exit(0)


main()
