"""What the launcher says in the environment, as a table: rank, size and local size before MPI has started."""

import os
import re
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

from hpcinfer.errors import EXIT_USAGE, MeshError, PeerError


class _Variables(NamedTuple):
    launcher: str
    rank: str
    size: str
    local_ranks: tuple[str, ...]  # the first that is set counts
    local_sizes: tuple[str, ...]


_GRACE_S = 2.0
_STEP_TASKS = "SLURM_STEP_TASKS_PER_NODE"  # as 4(x2),3: four tasks on two nodes, three on the next
_LOCAL_ID = "SLURM_LOCALID"
_LAUNCHERS = (
    _Variables(
        "mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Variables(
        "mpiexec (PMI)", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", _LOCAL_ID),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", _STEP_TASKS),
    ),
    _Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", (_LOCAL_ID,), (_STEP_TASKS,)),
)


class Launch(NamedTuple):
    """How this process was started."""

    launcher: str  # "" when it was started alone
    rank: int
    size: int
    local_size: int  # ranks on this node, or on the fullest one; 1 when the launcher does not say
    local_rank: int | None = None  # among them; None when the launcher does not say


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read rank and sizes from the environment; the first launcher of the table that is there counts."""
    for names in _LAUNCHERS:
        rank, size = environment.get(names.rank, ""), environment.get(names.size, "")
        if rank.isdigit() and size.isdigit():
            local_rank, local_size = (_first(environment, those) for those in (names.local_ranks, names.local_sizes))
            is_known = local_rank.isdigit()
            return Launch(
                names.launcher, int(rank), int(size), _fullest(local_size), int(local_rank) if is_known else None
            )
    return Launch("", 0, 1, 1)


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environment[name] for name in names if name in environment), "")


def _fullest(tasks_per_node: str) -> int:
    """Most tasks that a node has, of 4 or of 4(x2),3."""
    return max(map(int, re.findall(r"(?:^|,)([0-9]+)", tasks_per_node)), default=1)


def check_world_size(world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the size of the MPI world with what the launcher and Slurm asked for.

    Not collective.

    Raises:
        MeshError: the world is smaller or larger; the usual cause is an MPI that does not fit the launcher.
        PeerError: the same, where every rank is a world of its own and the first one has said so.
    """
    launch = read_launch(environment)
    expected = {launch.launcher or "alone": launch.size}
    tasks = environment.get("SLURM_NTASKS", "")
    if tasks.isdigit() and "SLURM_STEP_ID" not in environment:  # else it counts that step, as of mpirun's daemons
        expected["SLURM_NTASKS"] = int(tasks)
    for source, size in expected.items():
        if size != world_size:
            if world_size == 1 and launch.rank > 0:
                let_first_speak()
                raise _told_by_first(f"the MPI world has 1 rank, {source} says {size}")
            raise MeshError(
                f"the MPI world has {world_size} ranks, {source} says {size}",
                expected="one MPI world with a rank per task",
                where=f"host {socket.gethostname()}",
                hint="use srun --mpi=pmix with Open MPI, srun --mpi=pmi2 with MPICH, or mpirun; "
                "unset SLURM_NTASKS to run fewer ranks on purpose",
            )


def let_first_speak() -> None:
    """Wait a moment before ending: launchers end all ranks at the first failed exit; it must be the speaker's.

    Not collective.
    """
    time.sleep(_GRACE_S)


def _told_by_first(found: str) -> PeerError:
    error = PeerError(found)
    error.exit_code = EXIT_USAGE
    return error
