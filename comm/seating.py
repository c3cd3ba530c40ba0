"""The places of ranks in words and as plain data: which replica on which nodes, and what crosses them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from hpcinfer.comm.topology import Survey
from hpcinfer.partition.layout import Layout, ReplicaLayout
from hpcinfer.partition.topology import ALL, NODE, SWITCH, level_of

_NAMED = 6  # replicas or nodes that a line names; the report has all


class Spread(NamedTuple):
    """How many sets of ranks are inside a node, else below one switch, else neither."""

    node: int
    switch: int
    all: int

    def __str__(self) -> str:
        total = sum(self)
        if self.node == total:
            return f"all {total} inside a node" if total > 1 else "inside a node"
        parts = {"inside a node": self.node, "across nodes of a switch": self.switch, "across nodes": self.all}
        return ", ".join(f"{count} {where}" for where, count in parts.items() if count)


def spread_of(sets: Sequence[Sequence[int]], survey: Survey) -> Spread:
    """Count sets of ranks by the level that they stay inside."""
    levels = Counter(level_of([survey.locations[rank] for rank in ranks]) for ranks in sets)
    return Spread(levels[NODE], levels[SWITCH], levels[ALL])


def tp_groups(layout: Layout) -> list[tuple[int, ...]]:
    """The ranks of each stage of each replica."""
    return [stage for replica in layout.replicas for stage in _stages(replica)]


def describe_seats(layout: Layout, survey: Survey) -> str:
    """Say in a line which replica runs on which nodes, and how many tp groups stay inside one."""
    replicas = [f"{number} on {_hosts(replica.members, survey)}" for number, replica in enumerate(layout.replicas)]
    names = "; ".join(replicas[:_NAMED]) + (" ..." if len(replicas) > _NAMED else "")
    words = [f"replica{'s' * (len(replicas) > 1)} {names}"]
    if max(replica.mesh.tp for replica in layout.replicas) > 1:
        words.append(f"tp groups: {spread_of(tp_groups(layout), survey)}")
    if max(replica.mesh.pp for replica in layout.replicas) > 1:
        words.append(f"replicas: {spread_of([replica.members for replica in layout.replicas], survey)}")
    if layout.spares:
        words.append(f"spare on {_hosts(layout.spares, survey)}")
    return "; ".join(words)


def seats(layout: Layout, survey: Survey) -> list[dict[str, Any]]:
    """Where each rank runs and what its place is, as JSON values, by rank; dp, pp and tp are None on spare ranks."""
    coords: dict[int, tuple[int, int, int]] = {
        rank: (dp, pp, tp)
        for dp, replica in enumerate(layout.replicas)
        for pp, stage in enumerate(_stages(replica))
        for tp, rank in enumerate(stage)
    }
    return [
        {
            "rank": rank,
            "host": host,
            "node": location.node,
            "socket": location.socket,
            "switches": survey.above(rank),
            **dict(zip(("dp", "pp", "tp"), coords.get(rank, (None, None, None)), strict=True)),
        }
        for rank, (host, location) in enumerate(zip(survey.hosts, survey.locations, strict=True))
    ]


def _stages(replica: ReplicaLayout) -> list[tuple[int, ...]]:
    tp = replica.mesh.tp
    return [replica.members[start : start + tp] for start in range(0, len(replica.members), tp)]


def _hosts(ranks: Sequence[int], survey: Survey) -> str:
    """Nodes of ranks, the fullest first."""
    nodes = Counter(survey.locations[rank].node for rank in ranks).most_common()
    names = [survey.name_of(node) for node, _ in nodes]
    return "+".join(names[:_NAMED]) + ("+..." if len(names) > _NAMED else "")
