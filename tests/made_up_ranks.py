"""Facts of ranks on clusters that are not here: healthy ones, which a test then makes sick."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hpcinfer.comm.launcher import Launch
from hpcinfer.comm.library import MpiLibrary
from hpcinfer.diagnosis.devices import Devices
from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import Finding
from hpcinfer.diagnosis.node import Limit, Processors, SharedMemory, Software
from hpcinfer.diagnosis.places import Mount, Place
from hpcinfer.diagnosis.trial import Trial

GIB = 1 << 30
VERSIONS = {"hpcinfer": "0.1.0", "python": "3.11.7", "numpy": "2.4.6", "mpi4py": "4.1.2", "torch": "2.13.0"}


def rank_facts(rank: int = 0, **changes: Any) -> Facts:
    """A healthy rank, alone in its world and on its node of 8 cores, with a thread on each."""
    node = changes.pop("node", 0)
    facts = Facts(
        rank=rank, world_size=1, host=f"node{node:03}", machine=f"machine{node}", launch=Launch("", 0, 1, 1),
        environment={}, mpi=MpiLibrary("Open MPI 5.0.11", transport="ucx"),
        processors=Processors(tuple(range(8)), 8, 8, 8, "EPYC"), software=Software(VERSIONS, ("avx512", "avx2")),
        limits={name: Limit(-1, -1) for name in ("NOFILE", "NPROC", "AS", "MEMLOCK", "FSIZE", "CPU")},
        shared_memory=SharedMemory("/dev/shm", 1, 16 * GIB), devices=Devices(),
    )  # fmt: skip
    return replace(facts, **changes)


def cluster(nodes: int, per_node: int, change: Callable[[Facts], Facts] = lambda facts: facts) -> list[Facts]:
    """Healthy ranks under srun, each with a core of its own; `change` makes some of them sick."""
    size, ranks = nodes * per_node, []
    for rank in range(size):
        node, local = divmod(rank, per_node)
        facts = rank_facts(
            rank, node=node, world_size=size, launch=Launch("srun", rank, size, per_node, local),
            environment={"SLURM_STEP_ID": "0", "SLURM_NTASKS": str(size), "PMIX_NAMESPACE": "slurm.1.0"},
            processors=Processors((local,), 1, per_node, 1, "EPYC"),
            places=(place("model", "lustre", identity="index.h5:7"), place("output", "lustre")) if local == 0 else (),
            trial=Trial({}) if local == 0 else None,
        )  # fmt: skip
        ranks.append(change(facts))
    return ranks


def place(use: str, kind: str, **more: Any) -> Place:
    """A place with much room."""
    return Place(use, f"/{kind}/{use}", Mount(f"/{kind}", kind), 1000 * GIB, 10**6, **more)


def levels(findings: list[Finding], check: str = "") -> list[str]:
    """Levels of the findings of a check, of all if it is empty."""
    return [finding.level for finding in findings if check in ("", finding.check)]
