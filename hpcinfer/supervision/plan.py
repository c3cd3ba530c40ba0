"""The plan of a supervised job: which nodes, how many steps, started by what. Made once, before anything is started."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hpcinfer.config import JobMeshOptions, JobOptions, SuperviseOptions
from hpcinfer.errors import ConfigError, MeshError
from hpcinfer.supervision.base import Rules
from hpcinfer.supervision.launchers import Launcher, choose_launcher
from hpcinfer.supervision.nodes import Node, count_places, parse_nodes
from hpcinfer.supervision.slurm import Allocation


@dataclass(frozen=True)
class Plan:
    """What a supervisor works with."""

    rules: Rules
    nodes: list[Node]
    launcher: Launcher
    allocation: Allocation | None  # None outside Slurm


def make_plan(own: SuperviseOptions, mesh: JobMeshOptions, job: JobOptions, environment: Mapping[str, str]) -> Plan:
    """Find nodes and launcher, and count the replicas.

    Raises:
        ConfigError: an option out of range, or no launcher.
        MeshError: the replicas have no room.
    """
    _check(own, mesh)
    ranks = mesh.tensor_parallel_size * mesh.pipeline_parallel_size + mesh.spare_ranks
    allocation = Allocation(environment) if "SLURM_JOB_ID" in environment else None
    host = socket.gethostname()
    if own.nodes:
        nodes = parse_nodes(own.nodes, own.ranks_per_node)
    elif allocation:
        nodes = allocation.nodes(own.ranks_per_node)
    else:
        nodes = [Node(host, ranks * (mesh.data_parallel_size or 1))]
    num_replicas = _count_replicas(nodes, ranks, mesh.data_parallel_size)
    rules = Rules(num_replicas, ranks, own.restarts, own.backoff, own.grace, gives_back=own.give_back,
                  kept_node=environment.get("SLURMD_NODENAME", host), retries_errors=job.retry_errors)  # fmt: skip
    slots = {node.name: node.slots for node in nodes}
    return Plan(rules, nodes, choose_launcher(own.launcher, environment, slots, ranks * num_replicas), allocation)


def _count_replicas(nodes: list[Node], ranks: int, wanted: int | None) -> int:
    room = count_places(nodes, ranks)
    if room < (wanted or 1):
        slots = ", ".join(f"{node.name}:{node.slots}" for node in nodes)
        raise MeshError(f"{wanted or 1} replicas of {ranks} ranks have no room", expected=f"at most {room}",
                        where=slots, hint="ask Slurm for more tasks per node, or give --ranks-per-node")  # fmt: skip
    return wanted or room


def _check(own: SuperviseOptions, mesh: JobMeshOptions) -> None:
    sizes = mesh.tensor_parallel_size, mesh.pipeline_parallel_size, mesh.data_parallel_size
    if min(size for size in sizes if size is not None) < 1:
        raise MeshError("a size of the mesh is less than 1", expected="-tp, -pp and -dp of at least 1")
    if mesh.spare_ranks < 0:
        raise MeshError(f"--spare-ranks {mesh.spare_ranks}", expected="a number of at least 0")
    least = {"restarts": 0, "backoff": 0, "grace": 0, "ranks_per_node": 1}
    for name, lowest in least.items():
        value = getattr(own, name)
        if value is not None and not lowest <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value}", expected=f"a number of at least {lowest}")
