"""Slow ranks: those whose own computing takes much longer than their peers', without what they wait for others."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

_LEAST_S = 5.0  # of computing: before that nothing is said
_LIKE = 1.25  # factor between mean batches that still cost about the same per token


class Pace(NamedTuple):
    """What a rank has computed so far."""

    rank: int
    host: str
    replica: int
    pp_rank: int
    tp_rank: int
    share: float  # of a layer that it computes
    seconds: float  # in array functions
    steps: int
    tokens: int  # of all steps

    @property
    def is_known(self) -> bool:
        """Whether it has computed anything, with kernels that measure themselves."""
        return min(self.steps, self.tokens, self.seconds, self.share) > 0

    @property
    def token_s(self) -> float:
        """Seconds per token, if its share were whole layers."""
        return self.seconds / (self.tokens * self.share)


class _Peers(NamedTuple):
    """Those that a rank is compared with."""

    words: str
    factor: float  # from which on a rank is slow


_TP_PEERS = _Peers("its tensor-parallel peers", 1.5)
_LIKES = _Peers("its like in other replicas", 2.0)  # they compute other rows


class SlowRank(NamedTuple):
    """A rank that is slower than its peers."""

    rank: int
    host: str
    factor: float  # its time over their median
    peers: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} takes {self.factor:.1f} times as long to compute as {self.peers}"


def slow_ranks(paces: Iterable[Pace]) -> list[SlowRank]:
    """Compare each rank with those that do the same in its stage, and with its like in other replicas.

    Returns:
        The slow ones, by rank; each once, with the larger factor.
    """
    groups: defaultdict[tuple[_Peers, Hashable], list[Pace]] = defaultdict(list)
    for pace in filter(lambda pace: pace.is_known, paces):
        groups[_TP_PEERS, (pace.replica, pace.pp_rank)].append(pace)
        batch = round(math.log(pace.tokens / pace.steps, _LIKE))
        groups[_LIKES, (pace.pp_rank, pace.tp_rank, batch)].append(pace)
    found: dict[int, SlowRank] = {}
    for (peers, _), group in groups.items():
        for slow in _slow_of(group, peers):
            if slow.rank not in found or found[slow.rank].factor < slow.factor:
                found[slow.rank] = slow
    return [found[rank] for rank in sorted(found)]


def pace_of(rank: int, report: dict[str, Any]) -> Pace | None:
    """Read the pace of a rank from its report; None if it has no place, as spare ranks have none."""
    place, counts = report.get("place", {}), report.get("counts", {})
    if "share" not in place:
        return None
    return Pace(
        rank, report["host"], place["replica"], place["pp_rank"], place["tp_rank"], place["share"],
        sum(report["kernels"].values()), counts.get("steps", 0), counts.get("tokens", 0),
    )  # fmt: skip


def paces(reports: Iterable[dict[str, Any]]) -> Iterator[Pace]:
    """Read the paces from the reports of all ranks."""
    return filter(None, (pace_of(report["rank"], report) for report in reports))


def _slow_of(group: list[Pace], peers: _Peers) -> Iterator[SlowRank]:
    """Those of a group that are slower than the median of the others (the lower one of two)."""
    group.sort(key=lambda pace: pace.token_s)
    for i, pace in enumerate(group):
        middle = (len(group) - 2) // 2
        usual = group[middle if middle < i else middle + 1] if len(group) > 1 else pace
        if pace.seconds >= _LEAST_S and pace.token_s >= peers.factor * usual.token_s:
            yield SlowRank(pace.rank, pace.host, pace.token_s / usual.token_s, peers.words)
