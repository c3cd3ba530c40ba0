"""A program for mpiexec with fault tolerance: a group sums over made-up nodes while some members kill themselves.

usage: dying_forms.py FORM LENGTH VICTIM:STEP …
Prints, on each rank that is left at the end: rank, its members, the steps it did, seconds until it saw a death.
"""

import sys

import numpy as np
from lives import STEPS, Lives, leave

from hpcinfer.comm.mpi import world_group
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.errors import RankFailedError
from hpcinfer.partition.topology import Location

line = world_group()
line.locations = tuple(Location((rank // 4,), rank // 2, 0) for rank in range(line.size))
form, length = sys.argv[1], int(sys.argv[2])
lives = Lives(line, sys.argv[3:])


def work(view, step):
    """Sum ones, two sums at a time; every member must be in the same step."""
    group = TolerantGroup(line, view.members, view.epoch)
    reducer = TreeReducer(group, 8, lambda shape: np.empty(shape, np.float32), Selector(form))
    while step < STEPS:
        lives.begin(step)
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


leave(lives.live(work))
