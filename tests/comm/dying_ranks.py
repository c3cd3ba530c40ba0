"""A program for mpiexec with fault tolerance: a group sums in a loop while some of its members kill themselves.

usage: dying_ranks.py SPARES VICTIM:STEP … ; a victim with step -1 dies while the others regroup.
Prints, on each rank that is left at the end: rank, its members, epoch, and the steps it did.
"""

import json
import os
import signal
import sys

import numpy as np

from hpcinfer.comm.mpi import world_group
from hpcinfer.comm.regroup import Decision, View, answer_invitation, regroup
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.errors import RankFailedError, RevokedError

STEPS = 60
line = world_group()
spares = list(range(line.size - int(sys.argv[1]), line.size))
victims = dict(map(int, pair.split(":")) for pair in sys.argv[2:])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def decide(offers, guests):
    if victims.get(line.rank) == -1:
        die()
    members = tuple(offers)
    step = max(json.loads(offer)["step"] for offer in offers.values() if offer)
    return Decision(members + tuple(guests.invite(spares, 4 - len(members))), str(step).encode())


def work(group, step):
    """Sum ones; every member must be in the same step."""
    while step < STEPS:
        if victims.get(line.rank) == step:
            die()
        sums = np.empty((group.size, 1000), np.float32)
        group.all_gather(np.full(1000, step, np.float32), sums, [1000] * group.size)
        assert (sums == step).all(), f"{line.rank = } {step = } {sums[:, 0]}"
        step += 1
        yield step


def main():
    view, step = View(1, tuple(range(line.size - len(spares)))), 0
    try:
        while True:
            if line.rank not in view.members:
                found = answer_invitation(line, view)
                if found is None:
                    continue
                view, step = found, int(found.plan)
            try:
                for done in work(TolerantGroup(line, view.members, view.epoch), step):
                    step = done
                line.revoke()
                break
            except RevokedError:
                raise
            except RankFailedError:
                offer = json.dumps({"step": step}).encode()
                view = regroup(line, view, offer, decide)
                step = int(view.plan)
    except RevokedError:
        pass
    rest = line.shrink()
    print(json.dumps({"rank": line.rank, "members": view.members, "epoch": view.epoch, "step": step,
                      "left": rest.size}), flush=True)
    os._exit(0)


main()
