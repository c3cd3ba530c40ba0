"""What a run took: nodes, node-hours, energy, for each million output tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MILLION = 1e6


def nodes(ranks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes by name: processor, memory, ranks; what no rank of a node has looked at is None."""
    found: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        unknown = {"cpu": None, "cpus": None, "memory_bytes": None}
        node = found.setdefault(rank["host"], {"host": rank["host"], **unknown, "ranks": 0})
        node["ranks"] += 1
        node.update(rank.get("node") or {})
    return [found[host] for host in sorted(found)]


def energy(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Energy of all nodes, once for each; `joules` is None unless every node could be measured."""
    measured: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        if rank.get("energy"):
            measured.setdefault(rank["host"], rank["energy"])
    hosts = {rank["host"] for rank in ranks}
    known = {host: each["joules"] for host, each in measured.items() if each["joules"] is not None}
    reasons = sorted({each["why_not"] for each in measured.values() if each["why_not"]})
    if len(known) < len(hosts) and not reasons:
        reasons = ["not every node was measured to the end"]
    joules = sum(known.values()) if known and len(known) == len(hosts) else None
    parts: dict[str, float] = {}
    for each in measured.values():
        for name, value in each["parts"].items():
            kind = name.split()[0]
            parts[kind] = parts.get(kind, 0.0) + value
    return {"joules": joules, "by_kind": parts, "nodes_measured": len(known), "why_not": "; ".join(reasons)}


def usage(ranks: Sequence[dict[str, Any]], wall_s: float, joules: float | None) -> dict[str, Any]:
    """Time, node-hours and energy of a run.

    Args:
        ranks: reports by rank.
        wall_s: from the start of the processes until the report.
        joules: of all nodes, if known.
    """
    hosts, output = {rank["host"] for rank in ranks}, sum(rank["tokens"]["output"] for rank in ranks)
    node_hours = len(hosts) * wall_s / 3600
    millions = output / _MILLION
    return {
        "wall_s": wall_s, "nodes": len(hosts), "node_hours": node_hours, "output_tokens": output,
        "node_hours_per_million_output_tokens": node_hours / millions if output else None,
        "joules_per_million_output_tokens": joules / millions if output and joules is not None else None,
    }  # fmt: skip
