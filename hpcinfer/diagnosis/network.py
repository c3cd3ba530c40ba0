"""Findings about messages between ranks: slow pairs and what they have in common, clocks that differ."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from hpcinfer.comm.topology import Survey
from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import OK, WARNING, Finding
from hpcinfer.partition.topology import ALL, level_of
from hpcinfer.units import format_bytes

_LATE, _THIN = 4.0, 3.0  # an outlier's latency is above, its bandwidth below the median by this factor
_JITTER_S = 2e-5  # and by more than what a busy moment adds
_FEW = 3  # links that are too few for a median to mean something
_SLOW_FABRIC_S = 3e-5  # no InfiniBand or Slingshot is that slow: it is TCP
_CLOCK_S = 1.0
_COMMON = 0.6  # of the links that something takes part in are slow: then it is to blame
_NAMED = 4  # single links are named up to this number


class Link(NamedTuple):
    """Two ranks and how fast messages between them are, one way."""

    a: int
    b: int
    latency_s: float
    bytes_per_s: float


def check_links(
    links: Sequence[Link], facts: Mapping[int, Facts], survey: Survey, *, is_crowded: bool
) -> list[Finding]:
    """Judge the measured pairs.

    Args:
        links: what was measured.
        facts: by rank.
        survey: which of them share a switch.
        is_crowded: ranks take turns on CPUs, so that no link can be told from a busy moment.
    """
    within = [link for link in links if facts[link.a].host == facts[link.b].host]
    between = [link for link in links if facts[link.a].host != facts[link.b].host]
    below = [link for link in between if level_of([survey.locations[link.a], survey.locations[link.b]]) != ALL]
    above = [link for link in between if link not in below]
    kinds = {"within nodes": within, "between nodes of a switch": below,
             "between switches" if survey.switches else "between nodes": above}  # fmt: skip
    findings = [_summary(some, where, is_crowded) for where, some in kinds.items() if some]
    if not is_crowded:
        findings += _outliers(within, facts, survey, "within a node")
        findings += _outliers(between, facts, survey, "between nodes")
        findings += _detour(between, facts)
    return findings


def check_clocks(offsets: Mapping[int, float]) -> list[Finding]:
    """Judge clocks against the root's.

    Args:
        offsets: seconds, by rank.
    """
    hint = "chrony or ntpd there; results do not depend on it, times in logs will not agree"
    late = [Finding(WARNING, "clocks", f"{_rough(offset)} from rank 0's", hint, (rank,))
            for rank, offset in offsets.items() if abs(offset) > _CLOCK_S]  # fmt: skip
    if late or not offsets:
        return late
    return [Finding(OK, "clocks", f"at most {max(map(abs, offsets.values())) * 1e3:.1f} ms apart")]


def slow_links(links: Sequence[Link]) -> list[Link]:
    """Those far from the median of their kind."""
    if len(links) < _FEW:
        return []
    latency = statistics.median(link.latency_s for link in links)
    bandwidth = statistics.median(link.bytes_per_s for link in links)
    return [link for link in links
            if link.latency_s > max(latency * _LATE, latency + _JITTER_S) or link.bytes_per_s * _THIN < bandwidth]


def blame(
    slow: Sequence[Link], links: Sequence[Link], parts_of: Callable[[int], Iterable[str]]
) -> dict[str, list[Link]]:
    """Name what slow links have in common: a part (node, switch) most of whose links are slow, the largest first.

    Args:
        slow: some of `links`.
        links: all that were measured.
        parts_of: what a rank's messages pass: its node and switches.

    Returns:
        The slow links of each part; those left over under "".
    """
    all_of, parts, rest = _by_part(links, parts_of), {}, list(slow)
    while rest:
        slow_of = _by_part(rest, parts_of)
        shares = {part: len(some) / len(all_of[part]) for part, some in slow_of.items() if len(some) >= 2}
        guilty = [part for part, share in shares.items() if share >= _COMMON and len(all_of[part]) < len(links)]
        if not guilty:
            break
        worst = max(guilty, key=lambda part: (len(slow_of[part]), shares[part], part))
        parts[worst] = slow_of[worst]
        explained = set(slow_of[worst])
        rest = [link for link in rest if link not in explained]
    return {**parts, "": rest} if rest else parts


def _by_part(links: Iterable[Link], parts_of: Callable[[int], Iterable[str]]) -> dict[str, list[Link]]:
    """Links by what they pass."""
    found = defaultdict(list)
    for link in links:
        for part in {*parts_of(link.a), *parts_of(link.b)}:
            found[part].append(link)
    return found


def _outliers(links: Sequence[Link], facts: Mapping[int, Facts], survey: Survey, where: str) -> list[Finding]:
    def parts_of(rank: int) -> list[str]:
        node = [f"rank {rank}"] if where.startswith("within") else [f"node {facts[rank].host}"]
        return [*node, *(f"switch {name}" for name in survey.above(rank))]

    findings = []
    for part, slow in blame(slow_links(links), links, parts_of).items():
        numbers = _numbers(slow)
        if part:
            ranks = tuple(rank for rank, fact in facts.items() if part in parts_of(rank))
            text = f"slow links of {part} ({len(slow)}): {numbers}"
            hint = f"leave {'it out (--exclude)' if part.startswith('node') else 'its nodes out'}, tell the site"
            findings.append(Finding(WARNING, "network", text, hint, ranks))
        else:
            pairs = ", ".join(f"{link.a}-{link.b}" for link in slow[:_NAMED]) + (" ..." if len(slow) > _NAMED else "")
            text = f"slow links {where} ({len(slow)}), ranks {pairs}: {numbers}"
            findings.append(Finding(WARNING, "network", text, "again? once may be a busy moment"))
    return findings


def _detour(links: Sequence[Link], facts: Mapping[int, Facts]) -> list[Finding]:
    """Slow messages although every node has a fast adapter."""
    fabrics = {fact.devices.fabrics[:1] for fact in facts.values()}
    if not links or () in fabrics or statistics.median(link.latency_s for link in links) < _SLOW_FABRIC_S:
        return []
    transport = facts[links[0].a].mpi.transport
    hint = "without --with-ft, ucx and libfabric are used" if transport == "ob1" else "an MPI built for this fabric"
    name = next(iter(fabrics))[0]
    return [Finding(WARNING, "network", f"messages between nodes are as slow as TCP, though there is {name}", hint)]


def _summary(links: Sequence[Link], where: str, is_crowded: bool) -> Finding:
    note = "; no link is judged, as ranks take turns on CPUs" if is_crowded else ""
    return Finding(OK, "network", f"{where}: {len(links)} pairs, {_numbers(links)}{note}")


def _numbers(links: Sequence[Link]) -> str:
    latencies, speeds = sorted(link.latency_s for link in links), sorted(link.bytes_per_s for link in links)
    return f"latency {_span(latencies, _micro)} us, bandwidth {_span(speeds, _speed)}"


def _span(values: Sequence[float], write: Callable[[float], str]) -> str:
    low, high = write(values[0]), write(values[-1])
    return low if low == high else f"{low} to {high}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def _speed(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"


def _rough(seconds: float) -> str:
    return f"{seconds:+.1f} s" if abs(seconds) < 120 else f"{seconds / 60:+.0f} min"
