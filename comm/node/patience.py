"""How a rank waits for the others of its node: whether it keeps its core, and how it sees a dead one."""

import os
from collections.abc import Callable, Sequence

from hpcinfer.comm.protocol import Collectives
from hpcinfer.errors import RankFailedError

_SPINNING, _GIVING_WAY = (200, 400), (0, 60)  # looks while spinning, and between giving the core away
_TAG_NOTHING = 61  # of messages that nobody sends: looking for one lets the MPI see what has happened


def patience_for(cpus_of_members: Sequence[set[int]], local_size: int) -> tuple[int, int]:
    """Say how many looks a rank spins, and how many it gives its core away between, before it sleeps. Not collective.

    Args:
        cpus_of_members: those that each may run on.
        local_size: all ranks of the node, those of other groups too.
    """
    return _GIVING_WAY if is_crowded(cpus_of_members, local_size) else _SPINNING


def is_crowded(cpus_of_members: Sequence[set[int]], local_size: int) -> bool:
    """Whether there are more ranks on a node than cores for them, so that one that waits should give way.

    Not collective. Arguments are those of `patience_for`.
    """
    if local_size > (os.cpu_count() or 1):
        return True
    return any(sum(other <= cpus for other in cpus_of_members) > len(cpus) for cpus in cpus_of_members)


def own_cpus() -> set[int]:
    """CPUs that this process may run on. Not collective."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def watch(group: Collectives) -> Callable[[], None]:
    """Make what a rank that waits calls to let the MPI work, and to see a dead rank. Not collective.

    What it makes raises RankFailedError.
    """
    check = getattr(group, "check", None)

    def look() -> None:
        group.probe_bytes(_TAG_NOTHING)
        if check is not None:
            check()
        elif group.failed():
            raise RankFailedError("a rank has died")

    return look
