"""Discovery: which ranks share memory, a socket, a switch. From the system, and from Slurm where it knows."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hpcinfer.comm.protocol import Collectives
from hpcinfer.partition.topology import Location, by_node, numbered

SHARED_MEMORY = "/dev/shm"
_NUMA = Path("/sys/devices/system/node")
_SCONTROL = ("scontrol", "show", "topology")
_SCONTROL_S = 3.0  # a controller that is busy for longer is not waited for


class Survey(NamedTuple):
    """What was found out about the ranks of a group."""

    locations: tuple[Location, ...]  # by rank
    hosts: tuple[str, ...]  # by rank
    switches: tuple[str, ...] = ()  # names, by number

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return len(by_node(self.locations))

    def above(self, rank: int) -> list[str]:
        """Names of the switches above a rank, from the outermost."""
        return [self.switches[number] for number in self.locations[rank].switches]

    def name_of(self, node: int) -> str:
        """Host of a node; with its number where several nodes share a host's name, as containers may."""
        hosts = dict(zip((location.node for location in self.locations), self.hosts, strict=True))
        is_shared = list(hosts.values()).count(hosts[node]) > 1
        return f"{hosts[node]}#{node}" if is_shared else hosts[node]


class _Own(NamedTuple):
    """What a rank says of itself."""

    host: str
    memory: str  # equal on ranks that can share memory
    socket: int
    address: list[str]  # its switches, from the outermost, and its node, as Slurm's variables say
    node_name: str  # as Slurm calls it
    can_ask: bool  # whether Slurm can be asked


def discover(world: Collectives) -> tuple[Location, ...]:
    """Find out where all ranks run. Collective over the world; the same on every rank."""
    return survey(world).locations


def survey(world: Collectives) -> Survey:
    """Find out where all ranks run, and what nodes and switches are called.

    Collective over the world; the same on every rank. Must come before kernels bind this process to CPUs.
    """
    own = world.all_gather_bytes(json.dumps(_look(os.environ)).encode())
    ranks = [_Own(*json.loads(data)) for data in own]
    nodes = numbered([rank.memory for rank in ranks])
    switches = _of_addresses(ranks, nodes)
    if not any(switches) and max(nodes) > 0 and ranks[0].can_ask:
        known = _of_topology(_ask_slurm(), ranks) if world.rank == 0 else None
        data = world.broadcast_bytes(None if known is None else json.dumps(known).encode())
        switches = json.loads(data)
    return _located(ranks, nodes, switches)


def machine_id() -> str:
    """Something that all processes under one kernel share, in whatever container they are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def parse_topology(text: str) -> dict[str, list[str]]:
    """Read what `scontrol show topology` prints: the switches or blocks of each node, from the outermost."""
    above: dict[str, list[tuple[int, int, str]]] = {}
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = fields.get("SwitchName") or fields.get("BlockName") or fields.get("AggregatedBlock")
        level, nodes = fields.get("Level", ""), expand_hosts(fields.get("Nodes", ""))
        for node in nodes if name else ():
            above.setdefault(node, []).append((-int(level) if level.isdigit() else 0, -len(nodes), str(name)))
    return {node: _one_for_each_level(those) for node, those in above.items()}


def expand_hosts(text: str) -> list[str]:
    """Expand Slurm's way to write hosts: n[0-2,07],login is n0, n1, n2, n07 and login."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = [_numbers(piece[1:-1]) if piece.startswith("[") else [piece]
                  for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part)]  # fmt: skip
        hosts += map("".join, itertools.product(*pieces))
    return hosts


def _numbers(text: str) -> list[str]:
    """Expand 0-2,07."""
    runs = re.findall(r"([0-9]+)(?:-([0-9]+))?", text)
    return [f"{number:0{len(first)}}" for first, last in runs for number in range(int(first), int(last or first) + 1)]


def _one_for_each_level(above: Iterable[tuple[int, int, str]]) -> list[str]:
    """The first by name, where a node hangs on several switches of a level."""
    levels = itertools.groupby(sorted(above), key=lambda each: each[:2])
    return [next(those)[2] for _, those in levels]


def _look(environment: Mapping[str, str]) -> _Own:
    names = environment.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environment.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    address = [name for name, kind in zip(names, kinds, strict=False) if kind in ("switch", "block", "node")]
    can_ask = "SLURM_JOB_ID" in environment and shutil.which(_SCONTROL[0]) is not None
    node_name = environment.get("SLURMD_NODENAME", "")
    return _Own(socket.gethostname(), _shared_memory(), _own_socket(), address, node_name, can_ask)


def _shared_memory() -> str:
    """Equal where processes can map the same file: one kernel, and one file system under /dev/shm."""
    try:
        device = os.stat(SHARED_MEMORY).st_dev
    except OSError:
        device = 0
    return f"{machine_id()} {device}"


def _own_socket(root: Path = _NUMA) -> int:
    """The NUMA node that has all CPUs of this process; 0 if none has."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cpus = {str(cpu) for cpu in os.sched_getaffinity(0)}
    for node in sorted(root.glob("node[0-9]*")):
        try:
            inside = (node / "cpulist").read_text().strip()
        except OSError:
            continue
        if inside and cpus <= set(_numbers(inside)):
            return int(node.name.removeprefix("node"))
    return 0


def _of_addresses(ranks: Sequence[_Own], nodes: Sequence[int]) -> list[list[str]]:
    """Switches of each rank by Slurm's variables, none where a launcher has copied them from one node to another."""
    owners: dict[str, int] = {}
    for rank, node in zip(ranks, nodes, strict=True):
        if len(rank.address) < 2 or owners.setdefault(rank.address[-1], node) != node:
            return [[] for _ in ranks]
    return [rank.address[:-1] for rank in ranks]


def _ask_slurm() -> str:
    """What scontrol says of the network; nothing if it does not answer."""
    try:
        return subprocess.run(_SCONTROL, capture_output=True, text=True, errors="replace", timeout=_SCONTROL_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _of_topology(text: str, ranks: Sequence[_Own]) -> list[list[str]]:
    """Switches of each rank by what scontrol says; under its host's name first: variables may have been copied."""
    known = parse_topology(text)
    return [next((known[name] for name in (rank.host, rank.host.split(".")[0], rank.node_name) if name in known), [])
            for rank in ranks]  # fmt: skip


def _located(ranks: Sequence[_Own], nodes: Sequence[int], switches: Sequence[list[str]]) -> Survey:
    """Number everything. All ranks of a node get the switches of its first one, as many for each as any has."""
    first = [nodes.index(node) for node in nodes]
    length = max(map(len, switches)) if all(switches) else 0
    paths = [[*switches[rank], *switches[rank][-1:] * length][:length] for rank in first]
    numbers = iter(numbered([name for path in paths for name in path]))
    names = dict.fromkeys(name for path in paths for name in path)
    locations = [Location(tuple(itertools.islice(numbers, length)), node, rank.socket)
                 for node, rank in zip(nodes, ranks, strict=True)]  # fmt: skip
    return Survey(tuple(locations), tuple(rank.host for rank in ranks), tuple(names))
