"""Where runs take place: the hosts that there are, and the launcher that starts ranks on them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcinfer.errors import ConfigError
from hpcinfer.scaling.plan import Shape
from hpcinfer.supervision.launchers import Command, choose_launcher
from hpcinfer.supervision.nodes import Placement, Seat, parse_nodes
from hpcinfer.supervision.slurm import Allocation


@dataclass(frozen=True)
class Site:
    """Hosts and launcher."""

    launcher: str  # auto, mpiexec or srun
    environment: Mapping[str, str]
    hosts: tuple[str, ...] | None = None  # None: all ranks on this host, whatever number of nodes they stand for
    slots: int | None = None  # ranks that were asked for on each host; None if nobody has said

    def placement(self, shape: Shape) -> Placement | None:
        """Choose the hosts of a run; None if there are too few."""
        if self.hosts is None:
            return (Seat(socket.gethostname(), shape.ranks),)
        if len(self.hosts) < shape.nodes:
            return None
        return tuple(Seat(host, shape.ranks_per_node) for host in self.hosts[: shape.nodes])

    def command(self, step: str, placement: Placement, program: Sequence[str], *, shares_cores: bool) -> Command:
        """Say how to start a program on these hosts.

        Raises:
            ConfigError: there is no launcher.
        """
        slots = {seat.node: seat.ranks for seat in placement}
        environment = dict(self.environment)
        if shares_cores:  # a rank that spins takes the core that another needs
            environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        launcher = choose_launcher(self.launcher, environment, slots, sum(slots.values()))
        return launcher.command(step, placement, program)


def find_site(launcher: str, hosts: str | None, environment: Mapping[str, str]) -> Site:
    """Find the hosts: those that are named, those of the allocation, or this one.

    Raises:
        ConfigError: hosts that cannot be read, or an allocation that does not say which it has.
    """
    if hosts:
        if ":" in hosts:
            raise ConfigError(f"--hosts {hosts}", expected="HOST,...", hint="--ranks-per-node sets the ranks")
        return Site(launcher, environment, tuple(node.name for node in parse_nodes(hosts, None, "--hosts")))
    if "SLURM_JOB_ID" not in environment:
        return Site(launcher, environment)
    nodes = Allocation(environment).nodes(None)
    return Site(launcher, environment, tuple(node.name for node in nodes), min(node.slots for node in nodes))
