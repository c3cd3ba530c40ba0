"""Programs in whose loop some ranks kill themselves: those that are left regroup and go on from the furthest step."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator

from hpcinfer.comm.mpi import MpiGroup
from hpcinfer.comm.regroup import Decision, View, regroup
from hpcinfer.errors import RankFailedError

STEPS = 40


class Lives:
    """The ranks of a program, some of which kill themselves at some step.

    Args:
        line: all ranks.
        victims: what the command line says of them, each as VICTIM:STEP.
    """

    def __init__(self, line: MpiGroup, victims: list[str]) -> None:
        self._line, self._victims = line, dict(map(int, pair.split(":")) for pair in victims)

    def begin(self, step: int) -> None:
        """Begin a step, or die."""
        if self._victims.get(self._line.rank) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def live(self, work: Callable[[View, int], Iterator[int]]) -> dict[str, object]:
        """Work until all steps are done.

        Args:
            work: goes on from a step, and yields the number of steps done after each.

        Returns:
            rank, members, step and waited: the seconds until each death was seen.
        """
        line, step, waited = self._line, 0, []
        view = View(1, tuple(range(line.size)))
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
        return {"rank": line.rank, "members": view.members, "step": step, "waited": waited}


def leave(result: dict[str, object]) -> None:
    """Say a result and end, without the MPI's own end: it waits for the dead."""
    print(json.dumps(result), flush=True)
    os._exit(0)
