"""What a run took: nodes, node-hours, energy, for each million output tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from hpcinfer.report.rates import rates_of

_MILLION = 1e6
_COUNTED = {"RAPL": "processors and memory", "GPU": "GPUs"}


def hosts_of(run: dict[str, Any]) -> list[str]:
    """The host of each rank that was launched."""
    return [place["host"] for place in run["placement"]]


def nodes(hosts: Sequence[str], ranks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes by name: processor, memory, ranks; what no rank of a node has looked at is None.

    Args:
        hosts: of all ranks that were launched.
        ranks: reports of those that live.
    """
    unknown = {"cpu": None, "cpus": None, "memory_bytes": None}
    found = {host: {"host": host, **unknown, "ranks": count} for host, count in Counter(hosts).items()}
    for rank in ranks:
        found[rank["host"]].update(rank.get("node") or {})
    return [found[host] for host in sorted(found)]


def energy(hosts: Collection[str], ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Energy of all nodes, once for each; `joules` is None unless every node could be measured.

    Args:
        hosts: of all ranks that were launched.
        ranks: reports of those that live.
    """
    measured: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        if rank.get("energy"):
            measured.setdefault(rank["host"], rank["energy"])
    hosts = set(hosts)
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
    counted = " and ".join(words for kind, words in _COUNTED.items() if kind in parts)
    return {"joules": joules, "counted": counted, "by_kind": parts, "nodes_measured": len(known),
            "why_not": "; ".join(reasons)}  # fmt: skip


def usage(run: dict[str, Any], ranks: Sequence[dict[str, Any]], wall_s: float, joules: float | None) -> dict[str, Any]:
    """Time, node-hours and energy of a run.

    Args:
        run: placement, seconds by phase, seconds until it was loaded.
        ranks: reports of the ranks that live.
        wall_s: from the start of the processes until the report.
        joules: of all nodes, if known.
    """
    hosts, output = set(hosts_of(run)), sum(rank["tokens"]["output"] for rank in ranks)
    node_hours = len(hosts) * wall_s / 3600
    millions = output / _MILLION
    return {
        "wall_s": wall_s, "nodes": len(hosts), "node_hours": node_hours, "output_tokens": output,
        "output_tokens_per_s": rates_of(run, ranks).output,
        "node_hours_per_million_output_tokens": node_hours / millions if output else None,
        "joules_per_million_output_tokens": joules / millions if output and joules is not None else None,
    }  # fmt: skip
