"""A program for mpiexec with fault tolerance: made-up GPUs sum in a loop while some ranks kill themselves.

usage: dying_gpus.py nccl|pinned FORM VICTIM:STEP …
Prints, on each rank that is left at the end: rank, its members, the steps it did, seconds until it saw each death, and
how often each of its communicators was aborted.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_gpu import FakeGpu, FakeNccl
from lives import STEPS, Lives, leave

from hpcinfer.comm.device.opening import open_device_group
from hpcinfer.comm.mpi import world_group
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.errors import RankFailedError

LENGTH = 3000
line, wire = world_group(), world_group()
kind, form = sys.argv[1:3]
lives = Lives(line, sys.argv[3:])
made = []


class Nccl(FakeNccl):
    """Its messages wait for dead ranks for ever, as those of a GPU do."""

    def join(self, size, rank, unique_id):
        made.append(super().join(size, rank, unique_id))
        return made[-1]


def work(view, step):
    """Sum ones; every member must be in the same step."""
    group, gpu = TolerantGroup(line, view.members, view.epoch), FakeGpu(f"GPU {line.rank}")
    binding = Nccl(TolerantGroup(wire, view.members, view.epoch, watched=(line.rank,)))
    opened = open_device_group(group, gpu, lambda: binding if kind == "nccl" else None)
    reducer = TreeReducer(opened, 8, lambda shape: gpu.empty(int(np.prod(shape))), Selector(form),
                          arrays=gpu, most_elements=LENGTH)  # fmt: skip
    try:
        while step < STEPS:
            lives.begin(step)
            nodes = [gpu.put(np.full(LENGTH, step * (stop - start) / 8, np.float32)) for start, stop in reducer.spans]
            total = reducer.reduce(nodes)
            gpu.wait(opened.check)
            assert (gpu.get(total) == step).all(), f"{line.rank = } {step = }"
            step += 1
            yield step
        group.barrier()
    except RankFailedError:
        reducer.close()
        opened.close()
        gpu.wait(lambda: None)  # nothing hangs behind
        raise


leave({**lives.live(work), "aborts": [each.num_aborts for each in made]})
