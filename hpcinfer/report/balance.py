"""How evenly replicas worked, and what idled in the tail: from when the first of them had no work until the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple


class ReplicaWork(NamedTuple):
    """What one replica did."""

    replica: int
    ranks: int
    rows: int
    output_tokens: int
    last_step_s: float  # from the start of the run on


class Balance(NamedTuple):
    """What all replicas did."""

    replicas: tuple[ReplicaWork, ...]
    run_s: float  # of the slowest rank
    tail_s: float
    idle_rank_s: float  # seconds of ranks without work in the tail

    @property
    def tail_idle_share(self) -> float:
        """Share of the tail that ranks idled."""
        whole = self.tail_s * sum(each.ranks for each in self.replicas)
        return self.idle_rank_s / whole if whole else 0.0

    @property
    def run_idle_share(self) -> float:
        """Share of the whole run that ranks idled in its tail."""
        whole = self.run_s * sum(each.ranks for each in self.replicas)
        return self.idle_rank_s / whole if whole else 0.0

    @property
    def token_spread(self) -> float:
        """Tokens of the busiest replica over the mean; 1.0 is even."""
        tokens = [each.output_tokens for each in self.replicas]
        return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self._asdict(), "replicas": [each._asdict() for each in self.replicas],
                "tail_idle_share": self.tail_idle_share, "run_idle_share": self.run_idle_share,
                "token_spread": self.token_spread}  # fmt: skip


def balance(ranks: Sequence[dict[str, Any]]) -> Balance:
    """Read it from the reports of all ranks; spare ranks do not count."""
    members: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for rank in ranks:
        if rank.get("place"):
            members[rank["place"]["replica"]].append(rank)
    replicas = tuple(_work(replica, members[replica]) for replica in sorted(members))
    run_s = max((rank["phases"].get("run", 0.0) for each in members.values() for rank in each), default=0.0)
    if not replicas:
        return Balance((), run_s, 0.0, 0.0)
    tail_s = run_s - min(each.last_step_s for each in replicas)
    idle = sum(each.ranks * max(0.0, run_s - each.last_step_s) for each in replicas)
    return Balance(replicas, run_s, max(0.0, tail_s), idle)


def _work(replica: int, ranks: list[dict[str, Any]]) -> ReplicaWork:
    last = [rank["timeline"]["last_step_time"] - rank["began"] for rank in ranks if "timeline" in rank]
    return ReplicaWork(
        replica, len(ranks), sum(rank["rows"]["finished"] for rank in ranks),
        sum(rank["tokens"]["output"] for rank in ranks), max(0.0, *last) if last else 0.0,
    )  # fmt: skip
